"""`python -m offload`."""

from .cli import main

main()
