"""Plain-Python twins of the compiled modules: what each must do, written to be read, not to be fast.

They know nothing of the extensions. The same tests drive both.
"""
