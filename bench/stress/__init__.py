"""Random conversations over HTTP against a pool far too small for them, each answer told from a plain one.

It does not know blocks or steps: it sends requests, reads answers and asks /v1/status.
"""
