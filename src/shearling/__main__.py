"""`python -m shearling` is the command `shearling`."""

from shearling.cli import main

main()
