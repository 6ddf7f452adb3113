"""The gateway with one route more, which answers a constant: what HTTP, middleware and validation cost without us."""

from __future__ import annotations

from typing import Any

import uvicorn

from app.examples import QUEUED
from app.main import GatewayServer, create_app
from app.schemas import Generation, GenerationCreate
from app.settings import GatewaySettings


def main() -> None:
    settings = GatewaySettings()
    app = create_app(settings)
    # By the routes' own way of answering: a model that is checked and written as JSON
    shown = Generation.model_validate(QUEUED)

    @app.get("/constant")
    async def look() -> Generation:
        return shown

    @app.post("/constant", status_code=202)
    async def ask(create: GenerationCreate) -> Generation:
        return shown

    options: dict[str, Any] = {"access_log": False, "server_header": False, "ws": "none", "log_config": None}
    config = uvicorn.Config(app, host=settings.host, port=settings.port, **options)
    GatewayServer(config, app.state.gateway).run()


if __name__ == "__main__":
    main()
