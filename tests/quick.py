"""Options of jax.jit for programs that take longer to optimise than to run."""

QUICK = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}
