"""`python -m sfumato`."""

from sfumato.cli import process

process()
