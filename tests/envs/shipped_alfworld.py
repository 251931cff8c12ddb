"""Plays one game with the alfworld package exactly as shipped, in a process of its own.

Usage: python shipped_alfworld.py GAME < COMMANDS, the commands a JSON list. Prints a JSON list of
[text, admissible commands, reward, won], one for the reset and one for each command. It must not
import flash: the engine there changes textworld's modules.
"""

import json
import sys

import textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
from textworld.envs.pddl import PddlEnv


def main() -> None:
    game, commands = sys.argv[1], json.load(sys.stdin)
    infos = textworld.EnvInfos(feedback=True, won=True, admissible_commands=True)
    env = AlfredDemangler(PddlEnv(infos), shuffle=False)
    env.load(game)
    state, reward = env.reset(), 0
    transcript = [[state.feedback, state.admissible_commands, reward, state["won"]]]
    for command in commands:
        state, reward, done = env.step(command)
        assert done == state["won"]
        transcript.append([state.feedback, state.admissible_commands, reward, state["won"]])
    json.dump(transcript, sys.stdout)


main()
