"""A Google Cloud Storage server for tests: python tests/gcs_server.py prints the port that it listens on.

The emulator of gcp-storage-emulator, with what TensorStore needs and it lacks: generations in the answers, and writes
under a condition. It has one bucket, `bucket`. A request to /faults?status=503&count=3 makes the next three requests
fail so, except those of /faults; status 0 means that they are never answered.
"""

import sys
import urllib.parse

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound

FAULTS, UNANSWERED = [], []


class Handler(server.RequestHandler):
    """Requests, with generations, conditions and faults."""

    def _generation(self) -> str:
        """Generation of the object that the request is about; "0" if there is none."""
        url = urllib.parse.urlsplit(self.path)
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        name = urllib.parse.unquote(name.strip("/")) or dict(urllib.parse.parse_qsl(url.query)).get("name", "")
        try:
            return self.storage.get_file_obj(bucket, name)["generation"]
        except NotFound:
            return "0"

    def end_headers(self):
        """Add the generation."""
        if self._generation() != "0":
            self.send_header("x-goog-generation", self._generation())
        super().end_headers()

    def parse_request(self) -> bool:
        """Refuse a request whose condition does not hold, or that a fault is for."""
        if not super().parse_request():
            return False
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        status = None
        if FAULTS and url.path != "/faults" and not FAULTS[-1]:
            UNANSWERED.append(self.request)
            return bool(FAULTS.pop())
        if url.path == "/faults":
            FAULTS.extend([int(query["status"])] * int(query["count"]))
            status = 200
        elif FAULTS:
            status = FAULTS.pop()
        elif query.get("ifGenerationMatch") not in (None, self._generation()):
            status = 412
        if status:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            super().end_headers()
        return status is None


class Server(server.server.HTTPServer):
    """A server that leaves some connections open."""

    def shutdown_request(self, request):
        """Close a connection, unless its request is to wait."""
        if request not in UNANSWERED:
            super().shutdown_request(request)


if __name__ == "__main__":
    server.RequestHandler, server.server.HTTPServer = Handler, Server
    running = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    running.start()
    print(running._api._httpd.server_port, flush=True)
    sys.stdin.read()  # until the test closes it
