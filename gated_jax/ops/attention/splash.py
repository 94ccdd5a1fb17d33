"""To be written."""


def attend(query, key, value, gate, masking, spec):
  raise NotImplementedError('splash')
