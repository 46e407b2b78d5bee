"""`World`: one or two bodies that fall, fly, roll, bounce and meet in a room."""
