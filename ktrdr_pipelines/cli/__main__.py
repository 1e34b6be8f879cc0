"""`python -m ktrdr_pipelines.cli`: the same as the command `ktrdr`."""

from ktrdr_pipelines.cli.main import main

main()
