"""`rbm serve`: a model for many clients."""

from __future__ import annotations

import logging

import click


@click.command(short_help="Serve a model over HTTP and websockets.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--cfg", "show", is_flag=True, help="Print the configuration and stop.")
def serve(overrides: tuple[str, ...], show: bool) -> None:
    """Serve a model: clips over HTTP, live sessions over websockets, a page for people at /.

    It listens on this machine alone, unless host= says otherwise; a token (RBM_TOKEN=… or token=…) keeps others out.

    \b
    Examples:
      rbm serve
      rbm serve port=9000 checkpoint=runs/first/model
      rbm serve workers=2 device=cuda limits.session_bytes=8000000000
      RBM_TOKEN=secret rbm serve host=0.0.0.0 tls_cert=cert.pem tls_key=key.pem
      rbm serve --cfg                           every key there is
    """
    from rbm.config import compose, plain
    from rbm.scoring.server.settings import Settings

    config = compose("serve", overrides)
    if show:
        from omegaconf import OmegaConf

        click.echo(OmegaConf.to_yaml(config))
        return
    settings = Settings.from_config(plain(config))
    from rbm.scoring.server.run import serve as run

    logging.getLogger("rbm.scoring.server").setLevel(logging.INFO)
    run(settings)
