"""The time per image that embedding took, noted in passing. Speed is measured by `qclip bench`."""

from __future__ import annotations

from ..embedded import Embeddings
from ..request import Condition, Request
from ..writer import Writer


class Speed:
    name, label = "speed", "Time per image, in passing"

    def wants(self, request: Request) -> list[Condition]:
        return [Condition(each) for each in request.of("id")]

    def rows(self, request: Request, embedded: Embeddings, out: Writer) -> None:
        for condition in self.wants(request):
            n = len(embedded.indices(condition))
            page = out.page(condition.set.name, condition.set.role, n)
            for model, seconds in embedded.seconds(condition).items():
                host = out.results.meta.get("cpu", "")
                page.add(model, "ms_per_image", value=1000 * seconds / n, seconds=seconds, host=host)
            out.note("ms_per_image was taken while embedding, beside whatever else ran: `qclip bench` measures speed")
