"""``ktrdr completion``: print the script that makes a shell complete `ktrdr`. The script is click's own."""

from __future__ import annotations

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete commands, options and their values.

    bash (4.4 or newer): put the line below into ~/.bashrc. zsh: the same with zsh, into ~/.zshrc, after compinit.
    fish: ktrdr completion fish > ~/.config/fish/completions/ktrdr.fish

    \b
    $ eval "$(ktrdr completion bash)"
    $ ktrdr ib-load AAPL 1h --mode <Tab><Tab>
    backfill  full      tail
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"No completion for {shell}.")
    click.echo(kind(context.find_root().command, {}, "ktrdr", "_KTRDR_COMPLETE").source())
