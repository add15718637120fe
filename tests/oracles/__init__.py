"""Other people's implementations as judges, each in a Python environment of its own."""
