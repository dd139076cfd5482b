"""The tensor behind the page pool and its typed views.

Owns the bytes of every page; does not know which page belongs to whom.
Legend: P pages, K kv heads, C tokens per page, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraswarm.core.base_shape import BaseShape
from loraswarm.kernels.huge_pages import empty_in_huge_pages
from loraswarm.memory.geometry import PageGeometry
from loraswarm.memory.image import image_bytes, piece_bytes
from loraswarm.memory.packing import Packing
from loraswarm.memory.staging import Staging


class PageBuffer:
    """`num_pages` pages on one device, seen as K/V pages and as one flat array of elements.

        page p   | layer 0: K [K, C, E] | V [K, C, E] | layer 1: K | V | ...       (K/V)
                 | block | block | block | ... | unused                            (adapters)

    `pages` is [P, layers, 2, K, C, E], `pool` is flat; both in the base's dtype and over the same
    bytes, as is `floats`, flat float32. Memory is not cleared.
    """

    def __init__(
        self,
        num_pages: int,
        shape: BaseShape,
        geometry: PageGeometry,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert geometry.element_bytes == dtype.itemsize
        self.geometry = geometry
        num_bytes = num_pages * geometry.page_bytes
        self._staging: Staging | None = None
        if device.type == "cpu":
            self._bytes = empty_in_huge_pages((num_bytes,), torch.uint8)
        else:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._staging = Staging(device)
        self.pool: Tensor = self._bytes.view(dtype)
        self.floats: Tensor = self._bytes.view(torch.float32)
        self.pages: Tensor = self.pool.view(
            num_pages,
            shape.num_layers,
            2,
            shape.num_kv_heads,
            geometry.page_tokens,
            shape.head_size,
        )

    def moment(self) -> torch.cuda.Event | None:
        """All work on the pages that the calling thread has begun; None on the CPU, where nothing
        goes on by itself."""
        return None if self._staging is None else self._staging.moment()

    def wait_for(self, moment: torch.cuda.Event | None) -> None:
        """Let pieces that are copied from now on be written after that work, without waiting."""
        if self._staging is not None and moment is not None:
            self._staging.wait_for(moment)

    @property
    def layout(self) -> str:
        """What must be the same for a page's K and V to mean the same elsewhere."""
        _, num_layers, _, num_heads, page_tokens, head_size = self.pages.shape
        dtype = str(self.pool.dtype).removeprefix("torch.")
        return (
            f"dtype={dtype} layers={num_layers} kv_heads={num_heads} page_tokens={page_tokens}"
            f" head_size={head_size} page_bytes={self.geometry.page_bytes}"
        )

    def read_page(self, page: int) -> bytes:
        """The bytes of a page. Waits for the device: for all that was launched there before."""
        return self._bytes_of(page).cpu().numpy().tobytes()

    def write_page(self, page: int, data: bytes) -> None:
        """Set the bytes of a page, which no step under way may use; done when it returns, on a
        device too."""
        assert len(data) == self.geometry.page_bytes
        self._bytes_of(page).copy_(torch.from_numpy(np.frombuffer(data, np.uint8).copy()))

    def copy_pieces(self, image: np.ndarray, packing: Packing, starts: Sequence[int]) -> None:
        """Copy an image (memory/image) to where its pieces begin, in elements of `pool`.

        Pages that follow each other in the pool are copied as one. Any thread may call it, one at
        a time: it holds the GIL only between copies. Done when it returns, on a device too, where
        kernels under way that use these pages must have been waited for (`wait_for`).
        """
        assert image.nbytes == image_bytes(packing, self.geometry)
        sizes = piece_bytes(packing, self.geometry)
        copies = _copies(starts, sizes, self.geometry.element_bytes)
        if self._staging is not None:
            self._staging.copy(image, self._bytes, copies)
            return
        out = self._bytes.numpy()
        for source, target in copies:
            out[target] = image[source]

    def _bytes_of(self, page: int) -> Tensor:
        begin = page * self.geometry.page_bytes
        return self._bytes[begin : begin + self.geometry.page_bytes]


def _copies(
    starts: Sequence[int], sizes: Sequence[int], element_bytes: int
) -> list[tuple[slice, slice]]:
    """(bytes of the image, bytes of the pool) of each copy: pieces, joined where both follow."""
    found: list[tuple[slice, slice]] = []
    begin = 0
    for start, size in zip(starts, sizes, strict=True):
        source = slice(begin, begin + size)
        target = slice(start * element_bytes, start * element_bytes + size)
        if found and found[-1][1].stop == target.start:
            source = slice(found[-1][0].start, source.stop)
            target = slice(found[-1][1].start, target.stop)
            found.pop()
        found.append((source, target))
        begin += size
    return found
