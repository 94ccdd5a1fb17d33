"""The manners of every command: exit codes, and errors in one line.

    sys.exit(cli.run(lambda: program(cli.Parser(...).parse_args())))

A program raises ValueError, NotImplementedError or ImportError for what the
user has to change, and OSError or RuntimeError for what failed for another
reason; their messages are one line, or a list below one.
"""

import argparse
import gc
import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any
from typing import NoReturn

import absl.logging

from gated_jax.bucket_requests import BucketError
from gated_jax.bucket_requests import BucketRefused
from gated_jax.bucket_requests import bucket_error
from gated_jax.bucket_requests import is_of_bucket

DONE = 0
FAILED = 1  # not for anything that the user typed
REFUSED = 2  # the user has to change something first
UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
INTERRUPTED = 130  # a person pressed Ctrl-C


class TryLater(RuntimeError):
  """Nothing is wrong with the command; it can succeed when it is run again."""


# The first kind that an error is of says with which code the program ends.
CODES: dict[type[BaseException], int] = {
  TryLater: UNFINISHED,
  BucketRefused: REFUSED,
  BucketError: UNFINISHED,
  NotImplementedError: REFUSED,
  ValueError: REFUSED,
  ImportError: REFUSED,
  OSError: FAILED,
  RuntimeError: FAILED,
  MemoryError: FAILED,
}


class Parser(argparse.ArgumentParser):
  """argparse, but a wrong command line is a ValueError and no usage text."""

  def error(self, message: str) -> NoReturn:
    """Raises where argparse would print its usage and exit."""
    raise ValueError(message)


def count(text: str) -> int:
  """A number of things, of which there must be one at least."""
  try:
    number = int(text)
  except ValueError:
    number = 0
  if number < 1:
    raise argparse.ArgumentTypeError(f'{text!r} must be a positive number')
  return number


def run(program: Callable[[], int | None], debug: bool = False) -> int:
  """The exit code of a program whose errors are printed as one line.

  Args:
    program: Returns an exit code; None stands for 0.
    debug: Whether errors are raised, to show where they arose.
  """
  absl.logging.set_verbosity(absl.logging.FATAL)
  sys.unraisablehook = _unless_late_reader
  try:
    code = program() or DONE
  except BrokenPipeError:  # the reader of the output has closed the pipe
    discard(sys.stdout)
    code = FAILED
  except tuple(CODES) as error:
    if debug:
      raise
    code = _report(error)
  except Exception as error:  # the libraries of buckets have kinds of their own
    if debug or not is_of_bucket(error):
      raise
    code = _report(error)
  except KeyboardInterrupt:
    code = INTERRUPTED
  _flush()
  return code


def leave(code: int) -> NoReturn:
  """Ends this process without waiting for threads that ask a bucket in vain."""
  gc.collect()  # temporary files go with what they belong to
  _flush()
  os._exit(code)


def _flush() -> None:
  """Writes what is left, or drops it: Python would complain when it ends."""
  for stream in (sys.stdout, sys.stderr):
    try:
      if stream is not None:  # it is None where the shell closed it
        stream.flush()
    except OSError:
      discard(stream)


def _report(error: BaseException) -> int:
  # Messages of JAX itself take many lines, and are of no use without the place.
  if is_of_bucket(error):
    error = bucket_error(error, 'a bucket') or error
  elif len(str(error).splitlines()) > 1 and not _raised_here(error):
    raise error
  try:
    text = str(error) or type(error).__name__  # Python's MemoryError is empty
    print(f'error: {text}', file=sys.stderr, flush=True)
  except OSError:
    discard(sys.stderr)
  return next(code for kind, code in CODES.items() if isinstance(error, kind))


def _raised_here(error: BaseException) -> bool:
  """Says if a line of this package raised it, and so wrote the message."""
  *_, (frame, _) = traceback.walk_tb(error.__traceback__)
  return (
    pathlib.Path(__file__).parent
    in pathlib.Path(frame.f_code.co_filename).parents
  )


def discard(stream: Any) -> None:
  """Sends a stream that nobody reads any more nowhere.

  Python writes what is left in it when it ends, and would complain.
  """
  os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _unless_late_reader(unraisable: Any) -> None:
  """Reports what could not be raised, but for readers of a broken checkpoint.

  Orbax's readers outlive a restore that failed and was reported in one line:
  they complain of a loop that is closed, or when they are collected.
  """
  name = getattr(unraisable.object, '__qualname__', '')
  closed = 'Event loop is closed' in str(unraisable.exc_value)
  if not closed and 'read_array_index' not in name:
    sys.__unraisablehook__(unraisable)
