"""The report of a training: ``OUTPUT_DIR/report.html``, a page that needs nothing else.

Needs the package Jinja2, the extra ``report``.
"""

from .page import write_report

__all__ = ["write_report"]
