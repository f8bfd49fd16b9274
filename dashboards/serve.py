"""optuna-dashboard on a study database."""

from __future__ import annotations

from collections.abc import Callable

import optuna
import optuna_dashboard
import waitress
from optuna.storages import RDBStorage

from storage.errors import UserError


def serve(storage: RDBStorage, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until interrupted; `ready` gets the address once it is listened on.

    The storage is cached: uncached, 10,000 trials take 75 s a poll instead of 0.5 s.

    Raises:
        UserError: the address cannot be listened on.
    """
    application = optuna_dashboard.wsgi(optuna.storages.get_storage(storage))
    try:
        server = waitress.create_server(application, host=host, port=port)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    ready(f"http://{host}:{server.effective_port}")
    server.run()
