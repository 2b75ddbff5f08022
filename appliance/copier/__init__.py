"""Copying store paths, with their references and signatures, from Nix or from other services.

The sources live here, and what checks their claims and trees and commits them. Trees that are not
store paths yet never come here; `importer/` gives them names.
"""
