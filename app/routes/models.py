"""Models: what can be asked of which."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from app.deps import CallerDep, GatewayDep, KnownCaller, KnownQuery
from app.schemas import Model, ModelList, refusals

router = APIRouter(tags=["models"], dependencies=[KnownCaller, KnownQuery], responses=refusals(422))


@router.head("/v1/models", include_in_schema=False)
@router.get("/v1/models", summary="List the models", responses=refusals(401, 429, 503))
async def list_models(gateway: GatewayDep, _: CallerDep) -> ModelList:
    """Every model that a worker has ever offered, by name; `loaded` tells whether one holds it now."""
    cards, workers = await gateway.catalog.cards(), await gateway.queue.workers()
    return ModelList(models=[Model.of(cards[name], workers.get(name, 0)) for name in sorted(cards)])


@router.head("/v1/models/{name}", include_in_schema=False)
@router.get("/v1/models/{name}", summary="Look at a model", responses=refusals(401, 404, 429, 503))
async def get_model(
    name: Annotated[str, Path(description="Name of the model.")], gateway: GatewayDep, _: CallerDep
) -> Model:
    """One model: its defaults and limits, and whether a worker holds it now."""
    card, workers = await gateway.catalog.card(name), await gateway.queue.workers()
    return Model.of(card, workers.get(name, 0))
