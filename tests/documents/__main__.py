"""`python -m tests.documents` (make docs): writes the pages of docs/ that are made from other files.

It does not know their content.
"""

from __future__ import annotations

from tests.documents import configuration, conformance

conformance.PAGE.write_text(conformance.page(conformance.load()))
configuration.PAGE.write_text(configuration.page())
