"""onebase core: the words that serving and training share. Importing this package loads no torch."""

__version__ = "0.1.0"
