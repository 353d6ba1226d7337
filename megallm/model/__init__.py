"""The transformer as one rank holds it."""
