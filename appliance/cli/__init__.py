"""The command line: options, one module for each group of commands, and output to a terminal.

A command calls one function of the packages below, and `main` translates its errors to exit
statuses. Nothing about stores, sessions or trees is decided here.
"""
