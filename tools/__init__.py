"""Generators, which are run by a contributor and are no part of the product."""
