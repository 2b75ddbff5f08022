"""Code generators for contributors; they are not installed with the package."""
