"""Puts faults between a program and the storage emulator.

    with Proxy(emulator_port) as proxy:
      proxy.delay = 0.03  # seconds before every answer
      proxy.rate = 100e6  # bytes a second of all answers; 0: as fast as can be
      proxy.fail('GET .*/o/shard', status=503, times=2)
      proxy.fail('PUT', status=CUT)  # the connection ends in the answer's midst
      proxy.fail('GET', status=STALL)  # half of the answer, and then no more
      proxy.fail('POST .*lock', status=SILENT)  # taken, and never answered
      proxy.requests  # 'METHOD path' of all that came, in order

A pattern is compared with a request whose %2F are slashes. The name of an object
that is written stands in its request, also where the client sends it in the body.

It runs in threads of the test's own process, so that a test can set what is
wrong while another process works.
"""

import http.client
import http.server
import re
import threading
import time
import urllib.parse

from tests.storage.emulator import Server

# In place of a status:
CUT = 0  # half of the answer, then the end
STALL = -1  # half of the answer, then nothing until `heal`
SILENT = -2  # no answer until `heal`, and the storage does not hear of it
LOST = -3  # the storage does what is asked, but its answer never comes
NAME = re.compile(rb'"name": ?"([^"]+)"')
CHUNK = 1 << 16


class Fault:
  """What happens to the next requests that match."""

  def __init__(self, pattern, status, times, after):
    self.pattern, self.status = re.compile(pattern), status
    self.left, self.passed = times, after

  def strikes(self, request):
    """Tells whether a request is to fail, and counts it."""
    if not self.left or not self.pattern.match(urllib.parse.unquote(request)):
      return False
    if self.passed:
      self.passed -= 1
      return False
    self.left -= 1
    return True


class Handler(http.server.BaseHTTPRequestHandler):
  """Passes requests on, one connection at each side per thread."""

  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True

  def log_message(self, *args):
    del args

  def setup(self):
    super().setup()
    self.there = http.client.HTTPConnection('127.0.0.1', self.server.proxy.port)

  def finish(self):
    self.there.close()
    super().finish()

  def handle_any(self):
    proxy = self.server.proxy
    body = self.body()
    time.sleep(proxy.delay)
    written = NAME.search(body[:1000]) if 'multipart' in self.path else None
    name = f' {written[1].decode()}' if written else ''
    status = proxy.fault_for(f'{self.command} {self.path}{name}')
    if status == SILENT:
      proxy.healed.wait()
      self.close_connection = True
      return
    if status and status > 0:
      self.send(status, {}, b'{"error": {"message": "a fault of the test"}}')
      return
    headers = {
      k: v for k, v in self.headers.items() if k != 'Transfer-Encoding'
    }
    headers['Content-Length'] = str(len(body))
    self.there.request(self.command, self.path, body, headers)
    answer = self.there.getresponse()
    headers = dict(answer.getheaders())
    data = answer.read()
    if status == LOST:
      proxy.healed.wait()
      self.close_connection = True
      return
    self.send(answer.status, headers, data, status)

  do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = handle_any

  def body(self):
    if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length', 0)))
    body = b''
    while size := int(self.rfile.readline(), 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def send(self, status, headers, data, fault=None):
    self.send_response_only(status)
    for name, value in headers.items():
      if name != 'Content-Length' or self.command == 'HEAD':
        self.send_header(name, value)
    if self.command != 'HEAD' or 'Content-Length' not in headers:
      self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    if status == 304 or self.command == 'HEAD':
      return
    if fault in (CUT, STALL):
      self.wfile.write(data[: len(data) // 2])
      self.wfile.flush()
      if fault == STALL:
        self.server.proxy.healed.wait()
      self.close_connection = True
      return
    for start in range(0, len(data), CHUNK):
      chunk = data[start : start + CHUNK]
      self.server.proxy.pace(len(chunk))
      self.wfile.write(chunk)


class Proxy:
  """A server in front of the emulator's, with faults that a test sets."""

  def __init__(self, port):
    self.port = port
    self.delay = self.rate = 0.0
    self._free = 0.0  # when the line has carried what was given to it
    self.requests = []
    self.healed = threading.Event()
    self._faults = []
    self._lock = threading.Lock()
    self._server = Server(('127.0.0.1', 0), Handler)
    self._server.proxy = self
    self.address = f'http://127.0.0.1:{self._server.server_port}'
    self._thread = threading.Thread(
      target=self._server.serve_forever, daemon=True
    )

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *args):
    self.healed.set()
    self._server.shutdown()
    self._server.server_close()

  def fail(self, pattern, status, times=10**9, after=0):
    """Requests whose 'METHOD path' begins so fail, `times` of them.

    The first `after` of those are let through.
    """
    with self._lock:
      self._faults.append(Fault(pattern, status, times, after))
      self.healed.clear()

  def heal(self):
    """No faults any more."""
    with self._lock:
      self._faults.clear()
      self.delay = self.rate = 0.0
      self.healed.set()

  def pace(self, size):
    """Waits until a line of `rate` has carried so many bytes more."""
    if not self.rate:
      return
    with self._lock:
      now = time.monotonic()
      self._free = max(self._free, now) + size / self.rate
      wait = self._free - now
    time.sleep(wait)

  def struck(self):
    """Whether every fault with a number of times has happened so often."""
    with self._lock:
      return not any(fault.left for fault in self._faults)

  def fault_for(self, request):
    """The status that a request is to fail with; None: none."""
    with self._lock:
      self.requests.append(request)
      for fault in self._faults:
        if fault.strikes(request):
          return fault.status
    return None
