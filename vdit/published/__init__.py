"""Public layouts: networks that others published, read from their folders and written as such.

A family (the networks that one class name in a config.json stands for) is a module or a folder here
and a row of `families.FAMILIES`; nothing outside this package knows a family by its name.
"""
