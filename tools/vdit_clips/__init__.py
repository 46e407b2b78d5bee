"""A package of its own, as TFDS asks of a builder: the set's name is the package's."""
