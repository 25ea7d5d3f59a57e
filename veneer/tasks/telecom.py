"""Questions about telecommunication networks, made by small simulations: topologies, policies, traces and alarms that are drawn,
worked through, and told as a question with its answer. A stand-in for the synthetic domain data of arXiv:2505.07877.

A scenario is one drawn situation; it is told in several ways, and all of its tellings stay in one split.
"""

from __future__ import annotations

import heapq
import ipaddress
import itertools
import random
from collections.abc import Callable
from typing import Any

from veneer.errors import BadValue

ROLE = "You are an expert in telecommunication networks. Answer briefly and name the facts that decide."
SITES = ("Alder", "Birch", "Cedar", "Dogwood", "Elm", "Fir", "Hazel", "Juniper", "Larch", "Maple", "Oak", "Pine", "Rowan", "Spruce")
SERVICES = {"ssh": 22, "http": 80, "https": 443, "dns": 53, "snmp": 161, "bgp": 179, "sip": 5060}

Told = tuple[list[str], str, list[str]]
"""Ways to ask, the answer, and the words it has to hold."""


def network_fundamentals(draw: random.Random) -> Told:
    prefix = draw.randint(20, 29)
    net = ipaddress.ip_network(f"10.{draw.randrange(256)}.{draw.randrange(256)}.{draw.randrange(256)}/{prefix}", strict=False)
    hosts = net.num_addresses - 2
    asked = [f"How many hosts fit into {net}, and what is its broadcast address?", f"Plan the subnet {net}: usable hosts and broadcast?"]
    answer = f"A /{prefix} leaves {32 - prefix} host bits: {hosts} usable hosts. The broadcast address is {net.broadcast_address}."
    return asked, answer, [str(hosts), str(net.broadcast_address)]


def ip_routing(draw: random.Random) -> Told:
    names = draw.sample(SITES, 5)
    links = {(a, b): draw.randint(1, 20) for i, a in enumerate(names) for b in names[i + 1 :] if draw.random() < 0.6}
    links |= {(a, b): draw.randint(5, 20) for a, b in itertools.pairwise(names) if (a, b) not in links}
    cost, path = _shortest(links, names[0], names[-1])
    shown = ", ".join(f"{a}–{b} {c}" for (a, b), c in links.items())
    asked = [
        f"OSPF costs: {shown}. Which next hop does {names[0]} use towards {names[-1]}, and at what total cost?",
        f"Given the link costs {shown}, find the best path from {names[0]} to {names[-1]}: next hop and cost?",
    ]
    return asked, f"The least cost is {cost}, over {' → '.join(path)}; the next hop is {path[1]}.", [path[1], str(cost)]


def _shortest(links: dict[tuple[str, str], int], start: str, end: str) -> tuple[int, list[str]]:
    todo, seen = [(0, [start])], set()
    while todo:
        cost, path = heapq.heappop(todo)
        here = path[-1]
        if here == end:
            return cost, path
        if here in seen:
            continue
        seen.add(here)
        for (a, b), c in links.items():
            if here in (a, b):
                heapq.heappush(todo, (cost + c, [*path, b if here == a else a]))
    raise AssertionError("names are chained, so there is a path")


def mpls(draw: random.Random) -> Told:
    path, labels = draw.sample(SITES, 4), draw.sample(range(16, 2000), 3)
    steps = f"{path[0]} pushes {labels[0]}, {path[1]} swaps {labels[0]} for {labels[1]}, {path[2]} pops {labels[1]}"
    asked = [
        f"An LSP runs {' → '.join(path)}. {path[1]} advertised label {labels[0]}, {path[2]} label {labels[1]}, "
        f"{path[3]} implicit null. What happens to the label at every router?",
        f"Trace the labels on {' → '.join(path)} if {path[1]} hands out {labels[0]}, {path[2]} {labels[1]} and {path[3]} implicit null.",
    ]
    return asked, f"{steps}: {path[3]} gets the packet unlabelled.", [f"pushes {labels[0]}", f"for {labels[1]}", f"{path[2]} pops"]


def network_security(draw: random.Random) -> Told:
    names = draw.sample(list(SERVICES), 3)
    rules = [(draw.choice(("permit", "deny")), name, draw.randint(8, 24)) for name in names]
    name = draw.choice([*names, draw.choice([s for s in SERVICES if s not in names])])
    hit = next((i for i, rule in enumerate(rules) if rule[1] == name), None)
    verdict = "denied" if hit is None or rules[hit][0] == "deny" else "permitted"
    why = "no rule matches, so the implicit deny holds" if hit is None else f"rule {hit + 1} matches first"
    shown = "; ".join(f"{i}. {action} tcp 10.0.0.0/{p} port {SERVICES[s]}" for i, (action, s, p) in enumerate(rules, 1))
    asked = [
        f"Access list: {shown}. What happens to {name} from 10.0.0.7?",
        f"A packet to port {SERVICES[name]} comes from 10.0.0.7 and meets: {shown}. Is it let through?",
    ]
    return asked, f"It is {verdict}: {why}.", [verdict, "implicit" if hit is None else f"rule {hit + 1}"]


def automation(draw: random.Random) -> Told:
    port, vlan, mtu = f"eth{draw.randrange(8)}", draw.randint(2, 4000), draw.choice((1500, 9000, 9216))
    wanted = {"description": draw.choice(SITES), "vlan": vlan, "mtu": mtu}
    missing = draw.choice(list(wanted))
    has = ", ".join(f"{k} {v}" for k, v in wanted.items() if k != missing)
    asked = [
        f"Intended: interface {port} with {', '.join(f'{k} {v}' for k, v in wanted.items())}. Running: {has}. What has to be pushed?",
        f"The template of {port} says {', '.join(f'{k} {v}' for k, v in wanted.items())}; the device has {has}. Give the difference.",
    ]
    return (
        asked,
        f"Push `interface {port}` and `{missing} {wanted[missing]}`: it is the only missing line.",
        [f"{missing} {wanted[missing]}"],
    )


def oss_bss(draw: random.Random) -> Told:
    chain = draw.sample(SITES, 4)
    at = draw.randrange(3)
    alarms = [f"{name}: link down" if i == at else f"{name}: unreachable" for i, name in enumerate(chain) if i >= at]
    draw.shuffle(alarms)
    asked = [
        f"Traffic flows {' → '.join(chain)}. Alarms: {'; '.join(alarms)}. Which is the root cause?",
        f"Correlate these alarms on the chain {' → '.join(chain)}: {'; '.join(alarms)}.",
    ]
    hidden = len(chain) - at - 1
    return asked, f"The root cause is {chain[at]}: the {hidden} alarms behind it are consequences.", [f"cause is {chain[at]}", str(hidden)]


def ran(draw: random.Random) -> Told:
    serving, offset, hysteresis = draw.randint(-115, -95), draw.randint(1, 4), draw.randint(0, 2)
    neighbour = serving + draw.randint(0, 8)
    over = neighbour - serving
    moves = over > offset + hysteresis
    told = f"serving {serving} dBm, neighbour {neighbour} dBm, A3 offset {offset} dB, hysteresis {hysteresis} dB"
    asked = [f"Handover? {told}.", f"Is event A3 entered with {told}?"]
    sign, what = (">", "entered: hand over") if moves else ("≤", "not entered: stay")
    return asked, f"{over} dB {sign} {offset} + {hysteresis} dB, so A3 is {what}.", ["not entered" if not moves else "entered: hand over"]


def mobile_core(draw: random.Random) -> Told:
    steps = {
        "AMF": "registration request",
        "AUSF": "authentication",
        "UDM": "subscription data",
        "SMF": "session set-up",
        "UPF": "user plane",
    }
    failed = draw.choice(list(steps))
    done = [f"{steps[name]} ok in {draw.randint(5, 90)} ms" for name in list(steps)[: list(steps).index(failed)]]
    trace = "; ".join([*done, f"{steps[failed]} timed out after {draw.randint(2, 30)} s (cell {draw.randint(1, 99)})"])
    asked = [
        f"5G core trace: {trace}. Which network function is to be looked at?",
        f"Registration failed. Trace: {trace}. Where is the fault?",
    ]
    return asked, f"The {failed} is responsible for {steps[failed]}, the first step that failed.", [failed]


def satellite(draw: random.Random) -> Told:
    height = draw.choice((draw.randint(500, 1400), draw.randint(8000, 20000), 35786))
    delay = 2 * 2 * height / 299.792458
    orbit = "GEO" if height == 35786 else "MEO" if height > 2000 else "LEO"
    asked = [
        f"A bent-pipe satellite flies at {height} km. What is the least round-trip delay between two ground stations below it?",
        f"Estimate the propagation delay, there and back, over a transparent satellite {height} km up. Which orbit is that?",
    ]
    return asked, f"Four passes of {height} km at the speed of light take {delay:.0f} ms; the orbit is {orbit}.", [f"{delay:.0f} ms", orbit]


def ethical_ai(draw: random.Random) -> Told:
    days, limit = draw.randint(10, 400), draw.choice((30, 90, 180))
    use = draw.choice(("churn scores", "location traces", "call records", "complaint texts"))
    human = draw.random() < 0.5
    told = f"{use} kept for {days} days, limit {limit} days, decisions {'reviewed by staff' if human else 'fully automatic'}"
    faults = [w for w, bad in ((f"{days - limit} days too long", days > limit), ("no human review", not human)) if bad]
    verdict = "Not acceptable: " + " and ".join(faults) if faults else "Acceptable: retention is within the limit and people review"
    asked = [f"Review this use of customer data: {told}.", f"Does the policy allow it? {told[0].upper() + told[1:]}."]
    return asked, verdict + ".", faults or ["Acceptable: retention"]


USE_CASES: dict[str, Callable[[random.Random], Told]] = {
    f.__name__: f
    for f in (
        network_fundamentals, ip_routing, mpls, network_security, automation, oss_bss, ran, mobile_core, satellite, ethical_ai,
    )
}  # fmt: skip
"""The ten that are public, of twenty."""


def samples(each: int = 300, seed: int = 0, use_cases: dict[str, Callable[[random.Random], Told]] = USE_CASES) -> list[dict[str, Any]]:
    """`each` rows of every use case: messages, use case, scenario, id, and the facts of the answer; the same for the same seed.

    No two scenarios ask the same question. Raises `BadValue` for a use case that cannot be drawn so often.
    """
    rows: list[dict[str, Any]] = []
    for name, told in use_cases.items():
        draw, left, again = random.Random(f"{seed} {name}"), each, 0
        seen: set[str] = set()
        while left > 0:
            asked, answer, facts = told(draw)
            if asked[0] in seen:
                again += 1
                if again > 100 + 100 * len(seen):
                    raise BadValue(f"The use case {name!r} has about {len(seen)} scenarios, too few for {each} samples.")
                continue
            seen.add(asked[0])
            scenario, asked = f"{name}-{len(seen) - 1}", asked[:left]
            left -= len(asked)
            for i, question in enumerate(asked):
                messages = [("system", ROLE), ("user", question), ("assistant", answer)]
                rows.append(
                    {
                        "messages": [{"role": role, "content": text} for role, text in messages],
                        "use_case": name,
                        "scenario": scenario,
                        "id": f"{scenario}-{i}",
                        "facts": facts,
                    }
                )
    return rows
