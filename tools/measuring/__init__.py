"""Measures of videos, as papers print them."""
