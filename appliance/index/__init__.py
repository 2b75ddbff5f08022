"""The node index: content numbers, attributes and wire images, derived from the store."""
