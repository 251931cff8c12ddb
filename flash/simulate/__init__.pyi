from .results import Result as Result
from .run import simulate as simulate
from .scenario import Scenario as Scenario
from .scenario import load as load
