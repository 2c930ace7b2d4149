"""`python -m modan_fast` is `modan-fast`."""

from modan_fast.cli import main

main()
