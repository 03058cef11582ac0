"""The page itself: what is asked, what comes of it, and the results that a browser has made so far."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import gradio as gr

from opensora_repro.app.markup import html, problem, shown, time_line, waiting_for
from opensora_repro.app.settings import (
    AT,
    EDIT,
    END,
    EXTEND,
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_STEPS,
    START,
    USES,
    GivenFile,
    Settings,
    number,
    places,
    text,
    total_frames,
    whole,
)
from opensora_repro.app.studio import Job, Result, Studio
from opensora_repro.app.uploads import Upload
from opensora_repro.config import ConfigError
from opensora_repro.config.prompts import check_prompts
from opensora_repro.config.sections import sample_fps
from opensora_repro.errors import UserError

ROWS = 4  # files that can be given
AS_FIRST = "as the first"
LOOK_EVERY = 0.2  # seconds between two looks at a sample's progress
EMPTY = '<div class="empty">Say what should be seen, and press Generate.</div>'
ROW = ("use", "at", "part", "strength")
Values = Mapping[str, Any]  # by the names of the form's fields


class Page:
    """`shows_commands`: whether results tell how a terminal makes them, with names of this machine's folders."""

    def __init__(self, studio: Studio, *, title: str, shows_commands: bool) -> None:
        self.studio, self.shows_commands = studio, shows_commands
        self.jobs: dict[str, list[Job]] = {}  # by the session that waits for them
        self.first_run = next(iter(studio.runs))
        self.form: dict[str, Any] = {}
        with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as self.blocks:
            self.browser = gr.BrowserState("", storage_key="opensora-repro", secret="opensora-repro")
            self.files = gr.State([None] * ROWS)  # facts of the given files, one a row
            self.current = gr.State([])  # results that are shown
            self.listed = gr.State([])  # results of the gallery
            gr.Markdown(f"## {title}")
            with gr.Row(equal_height=False):
                with gr.Column(scale=5, min_width=320):
                    self._ask()
                with gr.Column(scale=7, min_width=320):
                    self._show()
            self.gallery = gr.Gallery(
                label="Your results", visible=False, columns=6, height="auto", object_fit="contain",
                allow_preview=False, interactive=False, fit_columns=False, buttons=[], elem_id="gallery",
            )  # fmt: skip
            self._connect()

    # What there is

    def _ask(self) -> None:
        defaults = self._defaults(self.first_run)
        form, runs = self.form, list(self.studio.runs)
        form["prompt"] = gr.Textbox(label=defaults["prompt_label"], lines=3, max_lines=8, elem_id="prompt")
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", elem_id="generate")
            self.halt = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
        with gr.Row():
            form["run"] = gr.Dropdown(runs, value=runs[0], label="Model", visible=len(runs) > 1, min_width=140)
            form["checkpoint"] = gr.Dropdown(**defaults["checkpoint"], label="Checkpoint", min_width=140)
        with gr.Row():
            form["shape"] = gr.Dropdown(**defaults["shape"], label="Height x width", min_width=140)
            form["seconds"] = gr.Number(
                defaults["seconds"], label="Seconds", info="0 is a picture", minimum=0,
                maximum=self.studio.max_seconds, step=0.01, min_width=120, elem_id="seconds",
            )  # fmt: skip
        with gr.Accordion("Given frames", open=False, elem_id="given") as self.given:
            self._ask_given()
        with gr.Accordion("More settings", open=False, elem_id="more"):
            form["negative"] = gr.Textbox(label="Negative prompt", info="what guidance leads away from", max_lines=4)
            form["steps"] = gr.Number(
                defaults["steps"], label="Steps", minimum=1, maximum=MAX_STEPS, precision=0, elem_id="steps"
            )
            form["guidance"] = gr.Slider(1, 20, defaults["guidance"], step=0.1, label="Guidance")
            form["seed"] = gr.Textbox(label="Seed", placeholder="by chance", max_lines=1, elem_id="seed")
            form["average"] = gr.Checkbox(True, label="Averaged weights", info="the moving average of training")
        with gr.Accordion("Side by side with other settings", open=False, elem_id="compare"):
            self._ask_second(runs)

    def _ask_given(self) -> None:
        self.upload = gr.UploadButton("Add a picture or a clip", size="sm", elem_id="upload")
        self.told = gr.HTML()
        self.line = gr.HTML()
        self.rows, self.names, self.removes = [], [], []
        for i in range(ROWS):
            with gr.Group(visible=False) as row:
                self.rows.append(row)
                with gr.Row():
                    self.names.append(gr.HTML(padding=True))
                    self.removes.append(gr.Button("Remove", size="sm", min_width=80, scale=0))
                choices = [(words, use) for use, words in USES.items()]
                with gr.Row():
                    self.form[f"use{i}"] = gr.Dropdown(choices, value=START, label="What to do with it", min_width=160)
                    self.form[f"at{i}"] = gr.Number(
                        0, label="From frame", precision=0, minimum=0, visible=False, min_width=90
                    )
                self.form[f"part{i}"] = gr.Textbox(
                    label="Its frames", placeholder="all that fit; or START:STOP", max_lines=1, visible=False
                )
                self.form[f"strength{i}"] = gr.Slider(
                    0, 0.99, 0, step=0.01, label="How much it may change", info="0 keeps it"
                )
        self.form["loop"] = gr.Checkbox(False, label="Loop", info="the end meets the beginning")
        self.form["paste"] = gr.Checkbox(
            False, label="Keep given pixels", info="rather than what the autoencoder makes of them"
        )

    def _ask_second(self, runs: Sequence[str]) -> None:
        form = self.form
        form["compare"] = gr.Checkbox(False, label="Make a second sample", info="what is left empty is as above")
        form["prompt2"] = gr.Textbox(label="Prompt", max_lines=4)
        form["negative2"] = gr.Textbox(label="Negative prompt", max_lines=4)
        with gr.Row():
            form["run2"] = gr.Dropdown(
                [AS_FIRST, *runs], value=AS_FIRST, label="Model", visible=len(runs) > 1, min_width=140
            )
            form["checkpoint2"] = gr.Dropdown(
                [AS_FIRST, *self.studio.checkpoints(runs[0])], value=AS_FIRST, label="Checkpoint", min_width=140
            )
        with gr.Row():
            for name in ("steps", "guidance", "seed"):  # a number's field would show 0 where it is left empty
                form[f"{name}2"] = gr.Textbox(label=name.capitalize(), max_lines=1, min_width=80)

    def _show(self) -> None:
        self.status = gr.HTML(elem_id="status")
        self.result = gr.HTML(EMPTY, elem_id="result")
        self.which = gr.Radio(["first", "second"], value="first", show_label=False, container=False, visible=False)
        with gr.Row(visible=False) as self.actions:
            self.again = gr.Button("Again with these", size="sm", min_width=100, elem_id="again")
            self.extend = gr.Button("Extend", size="sm", min_width=80, elem_id="extend")
            self.loop = gr.Button("Loop", size="sm", min_width=80, elem_id="loop")

    def _connect(self) -> None:
        """What happens by what. Nothing of it is an interface for programs."""
        form, fields = self.form, list(self.form.values())
        seen = [self.status, self.result, self.which, self.actions, self.extend, self.loop, self.current]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self.blocks.load(
            self._open, [self.browser], [self.browser, self.gallery, self.listed, form["checkpoint"]], **private
        )
        asked = {"fn": self._generate, "inputs": [self.browser, self.files, *fields]}
        asked["outputs"] = [*seen, self.gallery, self.listed, self.go, self.halt]
        gr.on([self.go.click, form["prompt"].submit], **asked, concurrency_limit=None, **private)
        self.halt.click(self._stop, [], [], **private)
        self.gallery.select(self._select, [self.browser, self.listed], seen, **private)
        form["run"].input(
            self._other_run, [form["run"]],
            [form[name] for name in ("prompt", "checkpoint", "shape", "seconds", "steps", "guidance")], **private,
        )  # fmt: skip
        form["run2"].input(self._second_run, [form["run"], form["run2"]], [form["checkpoint2"]], **private)
        self._connect_given(private)
        filled = [self.told, self.files, self.given, *self.rows, *self.names, *fields]
        chosen = [self.browser, self.current, self.which]
        self.again.click(self._again, chosen, filled, **private)
        self.extend.click(self._extend, chosen, filled, **private)
        self.loop.click(self._loop, chosen, filled, **private)

    def _connect_given(self, private: dict[str, Any]) -> None:
        form, fields = self.form, list(self.form.values())
        rows = [form[f"{name}{i}"] for i in range(ROWS) for name in ROW]
        outputs = [self.told, self.files, *self.rows, *self.names, *rows]
        self.upload.upload(self._add, [self.browser, self.upload, self.files], outputs, **private)
        for i in range(ROWS):
            self.removes[i].click(self._remove(i), [self.files], [self.files, self.rows[i]], **private)
            form[f"use{i}"].change(
                self._fields_of(i), [self.files, form[f"use{i}"]], [form[f"{name}{i}"] for name in ROW[1:]], **private
            )
        changes = [form[name].change for name in ("seconds", "checkpoint", "loop")] + [row.change for row in rows]
        gr.on(
            [*changes, self.files.change], self._line, [self.browser, self.files, *fields], [self.line],
            trigger_mode="always_last", **private,
        )  # fmt: skip

    # From fields to settings

    def _defaults(self, run: str, checkpoint: str | None = None) -> dict[str, Any]:
        names = self.studio.checkpoints(run)
        source = self.studio.source(run, checkpoint or names[0])
        shapes = [(f"{height} x {width}", f"{height}x{width}") for height, width in self.studio.shapes(source)]
        data, sample = source.config.data, source.config.sample
        by_class = source.model.conditioning == "class"
        return {
            "prompt_label": "Class number" if by_class else "Prompt",
            "checkpoint": {"choices": names, "value": checkpoint or names[0]},
            "shape": {"choices": shapes, "value": shapes[0][1]},
            "seconds": round(data.num_frames / sample_fps(source.config), 3) if data.num_frames > 1 else 0,
            "steps": sample.steps,
            "guidance": sample.guidance,
        }

    def _settings(self, files: Sequence[dict[str, Any] | None], values: Values) -> Settings:
        """Raises ConfigError for fields that are wrong, whoever filled them."""
        height, _, width = str(values["shape"]).partition("x")
        prompt = text(values["prompt"], "prompt")
        check_prompts([prompt], "prompt")
        return Settings(
            run=str(values["run"]),
            checkpoint=str(values["checkpoint"]),
            prompt=prompt,
            height=whole(height, "shape", 1, 1 << 14),
            width=whole(width, "shape", 1, 1 << 14),
            seconds=number(values["seconds"], "seconds", 0, self.studio.max_seconds),
            steps=whole(values["steps"], "steps", 1, MAX_STEPS),
            guidance=number(values["guidance"], "guidance", 0, MAX_GUIDANCE),
            seed=self._seed(values["seed"]),
            negative=text(values["negative"], "negative prompt"),
            average=bool(values["average"]),
            loop=bool(values["loop"]),
            paste=bool(values["paste"]) and any(files),
            given=tuple(self._given(i, facts, values) for i, facts in enumerate(files) if facts),
        )

    def _seed(self, value: Any) -> int:
        return secrets.randbelow(1_000_000) if value in (None, "") else whole(value, "seed", 0, MAX_SEED)

    def _given(self, i: int, facts: dict[str, Any], values: Values) -> GivenFile:
        use = values[f"use{i}"]
        if use not in USES:
            raise ConfigError(f"{facts['name']}: choose what to do with it")
        still = facts["num_frames"] == 1
        return GivenFile(
            file=facts["file"],
            name=facts["name"],
            use=use,
            at=whole(values[f"at{i}"], "from frame", 0, 1 << 20) if use == AT else 0,
            part="" if still or use not in (START, END, AT) else text(values[f"part{i}"], "its frames"),
            strength=number(values[f"strength{i}"], "how much it may change", 0, 0.99)
            if use in (START, END, AT, EDIT)
            else 0.0,
        )

    def _second(self, first: Settings, values: Values) -> Settings:
        """The settings beside the first: what is filled in there. Raises ConfigError."""
        found: dict[str, Any] = {}
        for name in ("prompt", "negative"):
            if text(values[f"{name}2"], name):
                found[name] = text(values[f"{name}2"], name)
        for name in ("run", "checkpoint"):
            if values[f"{name}2"] not in (AS_FIRST, "", None):
                found[name] = str(values[f"{name}2"])
        if found.get("run", first.run) != first.run and "checkpoint" not in found:
            found["checkpoint"] = self.studio.checkpoints(found["run"])[0]
        if values["steps2"] not in (None, ""):
            found["steps"] = whole(values["steps2"], "steps of the second", 1, MAX_STEPS)
        if values["guidance2"] not in (None, ""):
            found["guidance"] = number(values["guidance2"], "guidance of the second", 0, MAX_GUIDANCE)
        if values["seed2"] not in (None, ""):
            found["seed"] = whole(values["seed2"], "seed of the second", 0, MAX_SEED)
        return replace(first, **found)

    def _both_settings(self, files: Sequence[dict[str, Any] | None], values: Values) -> list[Settings]:
        first = self._settings(files, values)
        return [first, self._second(first, values)] if values["compare"] else [first]

    # What happens

    def _open(self, token: Any) -> Any:
        browser = self.studio.browser(token)
        names = self.studio.checkpoints(self.first_run)  # a run that goes on training has more by now
        return browser, *self._listing(browser), gr.update(choices=names, value=names[0])

    def _listing(self, browser: str) -> tuple[Any, list[str]]:
        results = list(self.studio.results(browser))
        posters = [(str(one.poster), one.settings.prompt) for one in results]
        return gr.update(value=posters, visible=bool(posters)), [one.id for one in results]

    def _generate(self, request: gr.Request, browser: str, files: Any, *fields: Any) -> Iterator[dict[Any, Any]]:
        session = str(request.session_hash)
        try:
            if any(not job.ended.is_set() for job in self.jobs.get(session, [])):
                raise ConfigError("a sample of this page is being made; wait for it, or stop it")
            settings = self._both_settings(files, dict(zip(self.form, fields, strict=True)))
            jobs = self.studio.submit(browser, settings)
        except UserError as error:
            yield {self.status: problem(str(error))}
            return
        self.jobs[session] = jobs
        try:
            yield {self.go: gr.update(visible=False), self.halt: gr.update(visible=True), self.result: ""}
            before = ""
            while any(not job.ended.is_set() for job in jobs):
                now = waiting_for(jobs, self.studio.before(next(job for job in jobs if not job.ended.is_set())))
                if now != before:
                    yield {self.status: now}
                before = now
                next((job for job in jobs if not job.ended.is_set()), jobs[0]).ended.wait(LOOK_EVERY)
        finally:  # also when the browser has gone
            for job in jobs:
                self.studio.stop(job)
            self.jobs.pop(session, None)
        gallery, listed = self._listing(browser)
        yield {
            **self._look(browser, [job.result for job in jobs if job.result], jobs),
            **{self.gallery: gallery, self.listed: listed},
            **{self.go: gr.update(visible=True), self.halt: gr.update(visible=False)},
        }

    def _stop(self, request: gr.Request) -> None:
        for job in self.jobs.get(str(request.session_hash), []):
            self.studio.stop(job)

    def _look(self, browser: str, ids: Sequence[str], jobs: Sequence[Job] = ()) -> dict[Any, Any]:
        """Show results, and what became of samples that have none."""
        results = [found for id in ids if (found := self.studio.result(browser, id)) is not None]
        commands = [self._command(browser, one) for one in results]
        problems = [job.message for job in jobs if job.state == "failed"]
        stopped = any(job.state == "stopped" for job in jobs)
        clips = any(one.file.suffix == ".mp4" for one in results)
        if not results:
            status = "".join(map(problem, problems)) or ("<p>Stopped.</p>" if stopped else "")
            return {self.status: status}
        return {
            self.status: "<p>Stopped.</p>" if stopped else "",
            self.result: shown(results, commands, problems),
            self.which: gr.update(visible=len(results) > 1, value="first"),
            self.actions: gr.update(visible=True),
            self.extend: gr.update(visible=clips),
            self.loop: gr.update(visible=clips),
            self.current: [one.id for one in results],
        }

    def _command(self, browser: str, result: Result) -> str:
        if self.shows_commands:
            with suppress(UserError, OSError):  # a checkpoint, or a file that was given, is gone
                return self.studio.command(browser, result)
        return ""

    def _select(self, browser: str, listed: list[str], event: gr.SelectData) -> Any:
        ids = listed[event.index : event.index + 1]
        if not any(self.studio.result(browser, id) for id in ids):
            return {self.status: problem("this result is not there any more")}
        return self._look(browser, ids)

    def _other_run(self, run: str) -> Any:
        found = self._defaults(run)
        return (
            gr.update(label=found["prompt_label"]),
            *(gr.update(**found[name]) for name in ("checkpoint", "shape")),
            *(found[name] for name in ("seconds", "steps", "guidance")),
        )

    def _second_run(self, run: str, other: str) -> Any:
        names = self.studio.checkpoints(run if other == AS_FIRST else other)
        return gr.update(choices=[AS_FIRST, *names] if other == AS_FIRST else names, value=None)

    # Given frames

    def _add(self, browser: str, sent: Any, files: list[dict[str, Any] | None]) -> dict[Any, Any]:
        try:
            if None not in files:
                raise ConfigError(f"{ROWS} files are given already; remove one first")
            upload = self.studio.upload(browser, str(sent))
        except UserError as error:
            return {self.told: problem(str(error))}
        i = files.index(None)
        files = [*files[:i], upload.facts(), *files[i + 1 :]]
        one = GivenFile(upload.file, upload.name, START if upload.still else EXTEND)
        return {self.told: "", self.files: files, **self._row(i, one, upload)}

    def _row(self, i: int, one: GivenFile, upload: Upload) -> dict[Any, Any]:
        what = "picture" if upload.still else f"clip of {upload.num_frames} frames"
        values = {"use": one.use, "at": one.at, "part": one.part, "strength": one.strength}
        return {
            self.rows[i]: gr.update(visible=True),
            self.names[i]: html("given", name=one.name, what=what),
            **{self.form[f"{name}{i}"]: value for name, value in values.items()},
        }

    def _remove(self, i: int) -> Any:
        def remove(files: list[Any]) -> Any:
            return [*files[:i], None, *files[i + 1 :]], gr.update(visible=False)

        return remove

    def _fields_of(self, i: int) -> Any:
        """Which fields a use has."""

        def fields_of(files: list[Any], use: str) -> Any:
            clip = bool(files[i]) and files[i]["num_frames"] > 1
            return (
                gr.update(visible=use == AT),
                gr.update(visible=clip and use in (START, END, AT)),
                gr.update(visible=use in (START, END, AT, EDIT)),
            )

        return fields_of

    def _line(self, browser: str, files: Any, *fields: Any) -> str:
        values = dict(zip(self.form, fields, strict=True))
        if not any(files):
            return ""
        try:
            settings = self._settings(files, {**values, "prompt": "any"})
            source = self.studio.source(settings.run, settings.checkpoint)
            found = places(settings, source, lambda file: self.studio.given_path(browser, file))
            return time_line(total_frames(settings, source), sample_fps(source.config), found)
        except UserError as error:
            return problem(str(error))

    # From a result back to the form

    def _chosen(self, browser: str, current: list[str], which: str) -> Result:
        ids = current[1:] if which == "second" and len(current) > 1 else current
        found = self.studio.result(browser, ids[0] if ids else "")
        if found is None:
            raise ConfigError("this result is not there any more")
        return found

    def _again(self, browser: str, current: list[str], which: str) -> dict[Any, Any]:
        try:
            return self._fill(browser, self._chosen(browser, current, which).settings)
        except UserError as error:
            return {self.told: problem(str(error)), self.given: gr.update(open=True)}

    def _extend(self, browser: str, current: list[str], which: str) -> dict[Any, Any]:
        return self._go_on(browser, current, which, EXTEND)

    def _loop(self, browser: str, current: list[str], which: str) -> dict[Any, Any]:
        return self._go_on(browser, current, which, START)

    def _go_on(self, browser: str, current: list[str], which: str, use: str) -> dict[Any, Any]:
        """Fill the form with a result's settings, and give the result itself."""
        try:
            result = self._chosen(browser, current, which)
            given = (GivenFile(result.id, "an earlier result", use),)
            return self._fill(browser, replace(result.settings, given=given, loop=use == START))
        except UserError as error:
            return {self.told: problem(str(error)), self.given: gr.update(open=True)}

    def _fill(self, browser: str, settings: Settings) -> dict[Any, Any]:
        """The form as it was for these settings. Raises ConfigError for a run or checkpoint that has gone."""
        form, defaults = self.form, self._defaults(settings.run, settings.checkpoint)
        shape = {**defaults["shape"], "value": f"{settings.height}x{settings.width}"}
        found: dict[Any, Any] = {
            form["prompt"]: gr.update(value=settings.prompt, label=defaults["prompt_label"]),
            form["run"]: settings.run,
            form["checkpoint"]: gr.update(**defaults["checkpoint"]),
            form["shape"]: gr.update(**shape),
            form["seed"]: str(settings.seed),
            self.told: "",
            self.given: gr.update(open=bool(settings.given) or settings.loop),
        }
        for name in ("seconds", "negative", "steps", "guidance", "average", "loop", "paste"):
            found[form[name]] = getattr(settings, name)
        files: list[dict[str, Any] | None] = [None] * ROWS
        for i, row in enumerate(self.rows):
            found[row] = gr.update(visible=False)
            if i < len(settings.given):
                upload = self.studio.facts(browser, settings.given[i])
                files[i] = upload.facts()
                found |= self._row(i, settings.given[i], upload)
        return {**found, self.files: files}
