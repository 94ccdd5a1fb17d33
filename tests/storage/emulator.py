"""A small Cloud Storage on loopback, in a process of its own.

It speaks as much of the JSON API as TensorStore, gcsfs and google-cloud-storage
use here: media, multipart and resumable uploads, reads of ranges, listings in
pages, batches of deletions, copies, and preconditions on generations, which
locks and checkpoints rely on. Objects live in memory, so they survive the
processes that wrote them and end with this one.

    python emulator.py        # prints the port that it listens on

A bucket exists from its first `POST /storage/v1/b`. Every request to one whose
name begins with `forbidden` is refused, as without permission, and a name of one
or two letters is no name.
"""

import base64
import email.parser
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse

PAGE = 1000  # entries in one listing at most, as in the real service
OBJECT = re.compile(r'(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)')
COPY = re.compile(
  r'/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)'
)
LISTING = re.compile(r'/storage/v1/b/([^/]+)/o')
UPLOAD = re.compile(r'/(?:upload|resumable/upload)/storage/v1/b/([^/]+)/o')
BUCKET = re.compile(r'/storage/v1/b/([^/]+)')


class Refused(Exception):
  """A request that ends with an HTTP status other than success."""

  def __init__(self, status, message):
    super().__init__(message)
    self.status = status


class Store:
  """Buckets of objects; each method is one operation nothing comes between."""

  def __init__(self):
    self._lock = threading.Lock()
    self._buckets = {}
    self._generations = itertools.count(1)
    self.uploads = {}  # by id: bucket, name, query, bytes so far, its object

  def objects(self, bucket):
    if bucket.startswith('forbidden'):
      raise Refused(403, f'no permission on bucket {bucket}')
    if len(bucket) < 3:
      raise Refused(400, f"Invalid bucket name: '{bucket}'")
    if bucket not in self._buckets:
      raise Refused(404, 'The specified bucket does not exist.')
    return self._buckets[bucket]

  def make_bucket(self, bucket):
    with self._lock:
      if bucket in self._buckets:
        raise Refused(409, f'bucket {bucket} exists')
      self._buckets[bucket] = {}

  def put(self, bucket, name, data, query):
    with self._lock:
      objects = self.objects(bucket)
      check(objects.get(name), query)
      objects[name] = (data, next(self._generations))
      return resource(bucket, name, *objects[name])

  def get(self, bucket, name, query):
    with self._lock:
      objects = self.objects(bucket)
      wanted = query.get('generation')
      if name not in objects or wanted not in (None, str(objects[name][1])):
        raise Refused(404, f'No such object: {bucket}/{name}')
      check(objects[name], query)
      return objects[name]

  def delete(self, bucket, name, query):
    with self._lock:
      objects = self.objects(bucket)
      check(objects.get(name), query)
      if name not in objects:
        raise Refused(404, f'No such object: {bucket}/{name}')
      del objects[name]

  def listing(self, bucket, query):
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
    first, end = query.get('startOffset', ''), query.get('endOffset', '')
    after = base64.b64decode(query.get('pageToken', '')).decode()
    limit = min(int(query.get('maxResults', PAGE)), PAGE)
    with self._lock:
      objects = dict(self.objects(bucket))
    entries = {}  # by what it sorts as: an object's resource, or a prefix's None
    for name in sorted(objects):
      if not name.startswith(prefix) or name < first or (end and name >= end):
        continue
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        entries[prefix + rest.split(delimiter)[0] + delimiter] = None
      else:
        entries[name] = resource(bucket, name, *objects[name])
    names = [name for name in entries if name > after]
    page = names[:limit]
    answer = {
      'kind': 'storage#objects',
      'items': [entries[name] for name in page if entries[name]],
      'prefixes': [name for name in page if not entries[name]],
    }
    if len(names) > limit:
      answer['nextPageToken'] = base64.b64encode(page[-1].encode()).decode()
    return answer


def check(entry, query):
  """Refuses what a precondition of the request does not allow."""
  generation = str(entry[1]) if entry else '0'
  if query.get('ifGenerationMatch', generation) != generation:
    raise Refused(412, 'At least one of the pre-conditions did not hold.')
  if query.get('ifGenerationNotMatch') == generation:
    raise Refused(304 if entry else 404, 'Not modified.')


def resource(bucket, name, data, generation):
  return {
    'kind': 'storage#object',
    'id': f'{bucket}/{name}/{generation}',
    'name': name,
    'bucket': bucket,
    'generation': str(generation),
    'metageneration': '1',
    'size': str(len(data)),
    'contentType': 'application/octet-stream',
    'storageClass': 'STANDARD',
    'md5Hash': base64.b64encode(hashlib.md5(data).digest()).decode(),
    'timeCreated': '2026-01-01T00:00:00.000000Z',
    'updated': '2026-01-01T00:00:00.000000Z',
  }


def parts_of(body, content_type):
  """Headers and bytes of each part of a multipart body, whose ends are exact."""
  header = email.parser.Parser().parsestr(f'Content-Type: {content_type}\n\n')
  boundary = f'--{header.get_boundary()}'.encode()
  for part in body.split(boundary)[1:-1]:
    head, _, data = re.split(rb'(\r?\n\r?\n)', part.lstrip(b'\r\n'), maxsplit=1)
    yield head.decode(), re.sub(rb'\r?\n\Z', b'', data)


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers one request after the other of a connection."""

  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True
  store = Store()

  def log_message(self, *args):
    del args

  def handle_any(self):
    body = self.read_body()
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    try:
      self.route(url.path, query, body)
    except Refused as error:
      message = {'code': error.status, 'message': str(error)}
      self.answer(json.dumps({'error': message}).encode(), error.status)

  do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = handle_any

  def read_body(self):
    if self.headers.get('Transfer-Encoding', '').lower() == 'chunked':
      body = b''
      while size := int(self.rfile.readline(), 16):
        body += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
      return body
    return self.rfile.read(int(self.headers.get('Content-Length', 0)))

  def answer(self, data, status=200, **headers):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    if status != 304:
      self.wfile.write(data)

  def answer_json(self, value, **headers):
    headers.setdefault('Content_Type', 'application/json')
    self.answer(json.dumps(value).encode(), **headers)

  def route(self, path, query, body):
    if found := UPLOAD.fullmatch(path):
      self.upload(unquoted(found)[0], query, body)
    elif path == '/batch/storage/v1':
      self.batch(body)
    elif path == '/storage/v1/b':
      self.store.make_bucket(json.loads(body)['name'])
      self.answer_json(json.loads(body))
    elif found := COPY.fullmatch(path):
      bucket, name, bucket_there, name_there = unquoted(found)
      data, _ = self.store.get(bucket, name, {})
      copy = self.store.put(bucket_there, name_there, data, query)
      self.answer_json({'done': True, 'resource': copy, **copy})
    elif found := OBJECT.fullmatch(path):
      self.object(*unquoted(found), query)
    elif found := LISTING.fullmatch(path):
      self.answer_json(self.store.listing(unquoted(found)[0], query))
    elif found := BUCKET.fullmatch(path):
      self.store.objects(unquoted(found)[0])
      self.answer_json({'kind': 'storage#bucket', 'name': found[1]})
    else:
      raise Refused(404, f'{self.command} {path} is not served')

  def object(self, bucket, name, query):
    if self.command == 'DELETE':
      self.store.delete(bucket, name, query)
      self.answer(b'', 204)
    elif query.get('alt') == 'media':
      self.media(*self.store.get(bucket, name, query))
    elif self.command == 'GET':
      data, generation = self.store.get(bucket, name, query)
      self.answer_json(resource(bucket, name, data, generation))
    else:
      raise Refused(405, f'{self.command} is not served for objects')

  def media(self, data, generation):
    headers = {
      'Content_Type': 'application/octet-stream',
      'X_Goog_Generation': str(generation),
      'X_Goog_Stored_Content_Length': str(len(data)),
    }
    asked = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if not asked:
      self.answer(data, **headers)
      return
    size = len(data)
    if asked[1]:
      first, end = int(asked[1]), min(size, int(asked[2] or size) + 1)
    else:
      first, end = max(0, size - int(asked[2])), size
    if first >= size:
      raise Refused(416, f'{first} is beyond the {size} bytes')
    headers['Content_Range'] = f'bytes {first}-{end - 1}/{size}'
    self.answer(data[first:end], 206, **headers)

  def upload(self, bucket, query, body):
    kind = query.get('uploadType')
    if 'upload_id' in query:
      self.upload_chunk(query['upload_id'], body)
    elif kind == 'media':
      self.answer_json(self.store.put(bucket, query['name'], body, query))
    elif kind == 'multipart':
      (_, meta), (_, data) = parts_of(body, self.headers['Content-Type'])
      name = query.get('name') or json.loads(meta)['name']
      self.answer_json(self.store.put(bucket, name, data, query))
    elif kind == 'resumable':
      self.store.objects(bucket)
      name = query.get('name') or json.loads(body)['name']
      number = f'upload-{len(self.store.uploads)}'
      self.store.uploads[number] = [bucket, name, query, b'']
      host = self.headers['Host']
      place = f'http://{host}/upload/storage/v1/b/{bucket}/o'
      words = urllib.parse.urlencode({'upload_id': number, 'name': name})
      self.answer(b'', Location=f'{place}?uploadType=resumable&{words}')
    else:
      raise Refused(400, f'uploadType {kind!r} is not served')

  def upload_chunk(self, number, body):
    upload = self.store.uploads.get(number)
    if upload is None:
      raise Refused(404, f'no upload {number}')
    if self.command == 'DELETE':
      del self.store.uploads[number]
      self.answer(b'', 204)
      return
    bucket, name, query, data = upload[:4]
    sent = re.fullmatch(
      r'bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)',
      self.headers.get('Content-Range', ''),
    )
    if sent and sent[1]:  # what came twice, after a cut connection, counts once
      data = data[: int(sent[1])] + body
    elif not sent:
      data = body
    upload[3] = data
    if sent and (sent[3] == '*' or len(data) < int(sent[3])):
      headers = {'Range': f'bytes=0-{len(data) - 1}'} if data else {}
      self.answer(b'', 308, **headers)
      return
    # Whoever lost the answer asks once more, and is told the same.
    if len(upload) == 4:
      upload.append(self.store.put(bucket, name, data, query))
    self.answer_json(upload[4])

  def batch(self, body):
    answers = []
    for _, request in parts_of(body, self.headers['Content-Type']):
      method, target = request.decode().split()[:2]
      url = urllib.parse.urlsplit(target)
      found = OBJECT.fullmatch(url.path)
      status, said = '204 No Content', ''
      try:
        if method != 'DELETE' or not found:
          raise Refused(400, f'{method} {target} is not served in a batch')
        query = dict(urllib.parse.parse_qsl(url.query))
        self.store.delete(*unquoted(found), query)
      except Refused as error:
        message = {'code': error.status, 'message': str(error)}
        status, said = f'{error.status} Error', json.dumps({'error': message})
      answers.append(
        f'Content-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n{said}\r\n'
      )
    text = ''.join(f'--batch\r\n{answer}\r\n' for answer in answers)
    self.answer(
      f'{text}--batch--'.encode(),
      Content_Type='multipart/mixed; boundary=batch',
    )


def unquoted(found):
  return [urllib.parse.unquote(group) for group in found.groups()]


class Server(http.server.ThreadingHTTPServer):
  """Serves each connection in a thread, and does not say who left early."""

  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, request, client_address):
    del request, client_address


if __name__ == '__main__':
  server = Server(('127.0.0.1', 0), Handler)
  print(server.server_port, flush=True)
  server.serve_forever()
