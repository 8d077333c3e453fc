"""The pyramid of memory as pure pytrees: sensory buffer, episodic stream, symbolic schema."""

from mmmem_jax.memory.pyramid import init as init
from mmmem_jax.memory.pyramid import scan as scan
from mmmem_jax.memory.pyramid import step as step
from mmmem_jax.memory.types import ADD_NEW as ADD_NEW
from mmmem_jax.memory.types import DISCARD as DISCARD
from mmmem_jax.memory.types import MERGE as MERGE
from mmmem_jax.memory.types import Item as Item
from mmmem_jax.memory.types import ManagerOutput as ManagerOutput
from mmmem_jax.memory.types import MemoryConfig as MemoryConfig
from mmmem_jax.memory.types import MemoryState as MemoryState
from mmmem_jax.memory.types import StepOutput as StepOutput
