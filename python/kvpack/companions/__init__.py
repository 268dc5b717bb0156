"""What runs beside a cache and has a say in how it is filled."""

from .lazyllm import LazyLLM

__all__ = ["LazyLLM"]
