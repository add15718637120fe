"""The runtime of mllama-deploy: bundle -> session -> decode loop -> text."""

__version__ = "0.1.0"
