"""The command line: options, one module per group of commands, and what a terminal shows.

Commands call one function of the packages below and translate errors to exit statuses; no decision
about stores, sessions or trees is made here.
"""
