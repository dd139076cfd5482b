"""What each command of the command line does; options and errors are `__main__`'s."""
