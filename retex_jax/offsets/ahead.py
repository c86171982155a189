"""Work that is begun before its turn comes, so that one piece computes while another reads or factorises.

No piece may factorise a batch of matrices. On CPUs jaxlib 0.10 hands the matrices of a batch to the threads of the pool
that it runs in itself and waits for them: as many batches at a time as there are threads wait for ever. One matrix is
factorised where it is.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_order(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    is_small: Callable[[_Item], bool],
    at_once: int = 2,
) -> Iterator[tuple[_Item, _Result]]:
    """Calls a function for every item, for some small ones at the same time.

    Args:
      function: called in threads of its own for small items.
      items: in their order.
      is_small: whether an item may be computed beside others. Any other is computed by itself, when all before it
        are consumed.
      at_once: small items that are computed or wait for their turn.

    Yields:
      Each item and its result, in order.
    """
    pool = ThreadPoolExecutor(at_once, "ahead")
    begun: deque[Future[_Result]] = deque()
    try:
        for turn, item in enumerate(items):
            if not is_small(item):
                yield item, function(item)
                continue
            for later in items[turn + len(begun) : turn + at_once]:
                if not is_small(later):
                    break
                begun.append(pool.submit(function, later))
            yield item, begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
