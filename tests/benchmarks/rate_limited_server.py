"""A server process whose limit is known: python rate_limited_server.py SLOTS SERVICE_MS NAME...

It answers `slots` questions at a time, each after `service_ms`, so it gives at most slots / service_ms * 1000 answers a
second; with SERVICE_MS 0 at once. One asyncio loop and hardly any work a request, so that the client is what is
measured. Prints its port.
"""

import asyncio
import json
import sys

SLOTS, SERVICE = int(sys.argv[1]), float(sys.argv[2]) / 1000
LIST = json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in sys.argv[3:]]}).encode()
CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "answer " * 20}}
REPLY = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [CHOICE]}
ANSWER = json.dumps(REPLY).encode()


def response(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def main() -> None:
    slots = asyncio.Semaphore(SLOTS)
    ready = {b"GET": response(LIST), b"POST": response(ANSWER)}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.lower().split(b"\r\n")
                length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
                await reader.readexactly(length)
                if head.startswith(b"POST") and SERVICE:
                    async with slots:
                        await asyncio.sleep(SERVICE)
                writer.write(ready[head.split(b" ", 1)[0]])
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
