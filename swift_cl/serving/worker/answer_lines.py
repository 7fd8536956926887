"""The engine process without HTTP: requests come as JSON lines through a socket pair, replies go back the same way.

It is `serve_adapters.py` without uvicorn: the same engine, flags and request handlers (called through ASGI, in
process), so its answers are those of the server. A request is `{"id", "method", "path", "body"}`, a reply
`{"id", "status", "body"}`; requests are answered concurrently, in the order in which they are done.

Run by file path like `serve_adapters.py`; SWIFT_CL_LINES_FD is the number of the socket it inherits.
"""

import asyncio
import json
import os
import socket
import traceback

import httpx
from serve_adapters import AdapterDeploy  # type: ignore[import-not-found]
from starter import watch_starter  # type: ignore[import-not-found]

LONGEST_LINE = 1 << 28


async def answer(deploy: AdapterDeploy, connection: socket.socket) -> None:
    """Answer until the other side closes."""
    reader, writer = await asyncio.open_connection(sock=connection, limit=LONGEST_LINE)
    running: set[asyncio.Task[None]] = set()

    async def one(request: dict[str, object]) -> None:
        try:
            reply = await client.request(str(request["method"]), str(request["path"]), json=request["body"])
            status, body = reply.status_code, reply.text
        except Exception as error:  # as a server does: into the log, and 500 for this request alone
            traceback.print_exc()
            status, body = 500, repr(error)
        line = json.dumps({"id": request["id"], "status": status, "body": body})
        writer.write(line.encode() + b"\n")

    transport = httpx.ASGITransport(deploy.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://offline", timeout=None) as client:
        while line := await reader.readline():
            task = asyncio.create_task(one(json.loads(line)))
            running.add(task)
            task.add_done_callback(running.discard)
        for task in running:
            task.cancel()


if __name__ == "__main__":
    watch_starter()
    lines = socket.socket(fileno=int(os.environ["SWIFT_CL_LINES_FD"]))
    deployed = AdapterDeploy()
    deployed.jsonl_writer = None  # what its run() does before it starts uvicorn; the answers are stored elsewhere
    asyncio.run(answer(deployed, lines))
