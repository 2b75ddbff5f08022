"""Boots small guests (UML, QEMU) and runs scripts in them; see vm-tests/README.md."""
