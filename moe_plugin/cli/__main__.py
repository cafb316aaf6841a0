"""`python -m moe_plugin.cli`, the same as the `moe-plugin` command; what torchrun starts."""

from moe_plugin.cli import main

main()
