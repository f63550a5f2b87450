"""Reasoning parsers: a model's thinking apart from its answer.

They do not know tools, tokens or requests.
"""
