"""What leads samples: the section `guidance`, of conditions, a classifier or a weaker model of another run.

`plan` checks all that needs no parameters; `guided` loads those of the other run and makes the score. They are an
argument of it, so that none of them is a constant of the compiled program.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxdiff import factory, guidance, options, rundir, samplers, schema, systems
from jaxdiff.commands import console
from jaxdiff.commands.telling import Told, told
from jaxdiff.data.examples import Source
from jaxdiff.models import conditioning
from jaxdiff.schema import Config, ConfigError
from jaxdiff.settings import GuidanceSettings
from jaxdiff.typing import ScoreFn, State

_QUANTILES = {"static": None, "dynamic": 0.995}
_READING = ("width", "layers", "heads", "max_frequency")  # how a network reads a condition, not what it is told


class Plan(NamedTuple):
  """What samples are told and led by.

  Attributes:
    settings: the section `guidance`.
    threshold: of the data prediction.
    told: the conditions that are stated.
    other: the config of the run of the classifier or of the weaker model.
  """

  settings: GuidanceSettings
  threshold: str
  told: Told
  other: Config | None

  def facts(self) -> Config:
    """The settings that samples depend on, without those that are as usual; parameters are no part of them."""
    facts: Config = {name: value.tolist() for name, value in self.told.written.items()}
    settings = self.settings
    if settings.scale is not None or self.other is not None:
      facts["guidance"] = {name: getattr(settings, name) for name in ("scale", "interval", "rescale")}
      facts["guidance"] |= {name: getattr(settings, name) is not None for name in ("classifier", "weak")}
    if self.other is not None:
      facts["other"] = {name: self.other[name] for name in ("prediction", "network")}
    return facts if self.threshold == "none" else facts | {"threshold": self.threshold}

  def written(self) -> Config:
    """All that samples were told and led by, to be written beside them."""
    told: Config = {name: value.tolist() for name, value in self.told.written.items()}
    return {**told, "guidance": dataclasses.asdict(self.settings), "threshold": self.threshold}

  def line(self) -> str | None:
    """How samples are guided, in words; None where they are not."""
    settings, scale = self.settings, self.settings.scale
    if self.other is None and scale in (None, 1):
      return None
    way = "classifier-free"
    if settings.classifier is not None:
      way, scale = f"by the classifier {settings.classifier}", 1.0 if scale is None else scale
    elif settings.weak is not None:
      way = f"by the weaker model {settings.weak}"
    parts = [way, f"scale {scale:g}"]
    parts += ["interval {:g} to {:g}".format(*settings.interval)] if settings.interval else []
    parts += [f"rescale {settings.rescale:g}"] if settings.rescale else []
    return f"guided: {', '.join(parts)}"


class Guided(NamedTuple):
  """A score and all the parameters it takes.

  Attributes:
    params: of the model, or {"model": ..., "other": ...}.
    score: from them to the score.
    decode: `(params, x)`, from states of the process to data; None where they are the data.
  """

  params: Any
  score: Callable[[Any], ScoreFn]
  decode: Callable[[Any, State], State] | None = None


def plan(config: Config) -> Plan:
  """What the samples of this config are told and led by.

  Raises:
    ConfigError: labels and prompts that the model does not know, guidance that it has no use for, or the directory of
      another run that is not a classifier, or a weaker model, of the same process and conditions.
  """
  settings, other, classes = options.guidance(config), None, None
  if settings.classifier is not None:
    other = _classifier(config, settings.classifier)
    classes = factory.make_network(other).classes
  elif settings.weak is not None:
    other = _weak(config, settings.weak)
  elif settings.scale is not None:
    _check_conditional(config, settings.scale)
  return Plan(settings, options.sample(config).threshold, told(config, classes), other)


def say(plan: Plan) -> None:
  """A line on how samples are guided, where they are."""
  if line := plan.line():
    console.say(line)


def _check_conditional(config: Config, scale: float) -> None:
  """Refuse guidance by the model's own conditions where it has none, or was never trained without them."""
  _refuse_flow(config)
  if not config["network"].get("conditions"):
    raise ConfigError(
      f"config.guidance.scale = {scale} leads to the conditions of the model, and config.network.conditions has none: "
      "leave it out, or guide by another run, --classifier=DIR or --weak=DIR"
    )
  if not options.train(config).drop_conditions:
    raise ConfigError(
      f"config.guidance.scale = {scale} needs a model that was trained without its conditions, too, and this one has "
      "config.train.drop_conditions = 0: train one with 0.1, or guide by another run, --classifier=DIR or --weak=DIR"
    )


def _refuse_flow(config: Config) -> None:
  if options.is_flow(config):
    raise ConfigError("config.guidance is of scores, and config.sde.type = 'CNF' has none: leave it out")


def _other(config: Config, name: str, directory: Any) -> Config:
  """The config of another run, of the same process."""
  _refuse_flow(config)
  path = Path(directory) / "config.json"
  if not path.is_file():
    raise ConfigError(f"config.guidance.{name} = {directory} is no directory of a run: it has no config.json")
  other = factory.read(path)
  schema.check_sections(other)
  _check_kind(config, name, directory, other)
  theirs, ours = (schema.resolved("sde", made["sde"]) for made in (other, config))
  types = factory.differences(theirs["type"], ours["type"], "config.sde.type")
  if found := types or factory.differences(theirs, ours, "config.sde"):
    raise ConfigError(
      f"config.guidance.{name} = {directory} is of another process: {'; '.join(found)} in the model. "
      "Take, or train, a run with the same config.sde"
    )
  if factory.learned(config) is not None:
    raise ConfigError(
      f"config.guidance.{name} needs runs of one process, and config.sde has learned parts, other ones in each run: "
      "leave it out"
    )
  return other


def _check_kind(config: Config, name: str, directory: Any, other: Config) -> None:
  """Refuse runs without scores of the same states."""
  ours, theirs = schema.kind(config), schema.kind(other)
  if "sde" not in other:
    raise ConfigError(f"config.guidance.{name} = {directory} holds an {theirs}, which has no score: take another run")
  if name == "classifier" and ours == "latent":
    raise ConfigError("config.guidance.classifier is of images, and this is a diffusion of latents: leave it out")
  of = lambda side: side.get("autoencoder", {}).get("fingerprint")
  if name == "weak" and theirs != "classifier" and (ours != theirs or of(config) != of(other)):
    raise ConfigError(
      f"config.guidance.weak = {directory} holds a run of the kind {theirs!r}, or of another autoencoder; this one is "
      f"{ours!r}: take a weaker model of the same states"
    )


def _classifier(config: Config, directory: Any) -> Config:
  other = _other(config, "classifier", directory)
  if not schema.is_classifier(other):
    raise ConfigError(
      f"config.guidance.classifier = {directory} holds a {other['network']['type']}, which is no classifier: take a "
      "run with config.network.type = 'Classifier', or --weak for a weaker model"
    )
  if names := other["network"].get("conditions"):
    raise ConfigError(
      f"config.guidance.classifier = {directory} is told {', '.join(names)}, which samples have not: take one without "
      "config.network.conditions"
    )
  return other


def _weak(config: Config, directory: Any) -> Config:
  other = _other(config, "weak", directory)
  if schema.is_classifier(other):
    raise ConfigError(
      f"config.guidance.weak = {directory} holds a classifier: take a run of a weaker model, or --classifier for it"
    )
  ours, theirs = (_told_of(made) for made in (config, other))
  for name in theirs:
    if ours.get(name) != theirs[name]:
      raise ConfigError(
        f"config.guidance.weak = {directory} is told {name} as {theirs[name]}, the model {ours.get(name, 'is not')}: "
        "take a run with the same config.network.conditions, or without them"
      )
  return other


def _told_of(config: Config) -> dict[str, Config]:
  """What a network is told, however it reads it."""
  sections = config["network"].get("conditions", {})
  resolved = {name: schema.resolved(f"network.conditions.{name}", section) for name, section in sections.items()}
  return {name: {k: v for k, v in made.items() if k not in _READING} for name, made in resolved.items()}


def guided(config: Config, plan: Plan, source: Source, params: Any) -> Guided:
  """The score that samples are drawn by: guided, and within the range of the data where that is asked for.

  Raises:
    ConfigError: the other run cannot be loaded, or is of other data than the source.
  """
  system = systems.of(config)
  process, base, decode = system.process(config, params), system.score(config), system.decode(config)
  within = lambda score: score
  if plan.threshold != "none":
    within = lambda score: samplers.thresholded(process, score, quantile=_QUANTILES[plan.threshold])
  if plan.other is None:
    lead = _by_conditions(config, plan, process)
    return Guided(params, lambda params: within(lead(base(params))), decode)
  by = _by_classifier if plan.settings.classifier is not None else _by_weaker
  led = by(config, plan, plan.other, process)
  both = {"model": params, "other": _load_other(plan.settings, plan.other, source)}
  of_model = None if decode is None else lambda both, x: decode(both["model"], x)
  return Guided(both, lambda both: within(led(base(both["model"]), both["other"])), of_model)


def _scale(settings: GuidanceSettings, process: Any) -> Any:
  scale: Any = settings.scale
  return guidance.interval(process, scale, *settings.interval) if settings.interval else scale


def _by_conditions(config: Config, plan: Plan, process: Any) -> Callable[[Any], Any]:
  settings = plan.settings
  if settings.scale in (None, 1):
    return lambda score: score
  null = conditioning.null(factory.make_network(config).conditions)
  scale = _scale(settings, process)
  return lambda score: guidance.classifier_free(score, null, scale, rescale=settings.rescale)


def _by_classifier(config: Config, plan: Plan, other: Config, process: Any) -> Callable[[Any, Any], Any]:
  own, apply = config["network"].get("conditions", {}), factory.make_network(other).apply
  scale = 1.0 if plan.settings.scale is None else plan.settings.scale
  stated = {"label", *plan.told.stated}
  not_the_model, not_the_classifier = sorted(stated - own.keys()), sorted((stated | own.keys()) - {"label"})
  without = lambda score, names: guidance.without(score, *names) if names else score

  def led(score: Any, params: Any) -> Any:
    log_prob = without(guidance.log_probability(apply, params), not_the_classifier)
    return guidance.classifier(without(score, not_the_model), log_prob, scale)

  return led


def _by_weaker(config: Config, plan: Plan, other: Config, process: Any) -> Callable[[Any, Any], Any]:
  weaker, scale = systems.of(other).score(other), _scale(plan.settings, process)
  names = sorted(_told_of(config).keys() - _told_of(other).keys())

  def led(score: Any, params: Any) -> Any:
    weak = weaker(params)
    return guidance.autoguidance(score, guidance.without(weak, *names) if names else weak, scale)

  return led


def _load_other(settings: GuidanceSettings, config: Config, source: Source) -> Any:
  """The parameters of the other run, of the same data."""
  name = "weak" if settings.classifier is None else "classifier"
  directory = Path(getattr(settings, name))
  seen, params, _ = rundir.load(directory, config)
  if found := rundir.differences_of_data(seen, source):
    raise ConfigError(
      f"config.guidance.{name} = {directory} was trained on other data: {'; '.join(found)} in the model. "
      "Take, or train, a run on the same data"
    )
  return params
