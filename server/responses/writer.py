"""The response object and its stream of events, from the chat pipeline's events."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from engine.types import ModelInfo, TextOutput
from server.chat_pipeline import ChatJob, ChoiceEvent, EventReader
from server.errors import ApiError
from server.outputs import UsageCounter
from server.responses.items import new_id
from server.responses.output import OutputBuilder
from server.responses.schema import ResponsesRequest
from server.sse import Wording, named_frame

# the codes that the API knows for `error.code` of a response
_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}


class ResponseWriter(Wording):
    """One response: built once, told as events when somebody listens. Also the wording of its stream."""

    done = b""  # the stream ends with its terminal event

    def __init__(
        self,
        fields: ResponsesRequest,
        job: ChatJob,
        info: ModelInfo,
        *,
        is_stored: bool,
        on_end: Callable[[dict[str, Any]], None],
    ) -> None:
        """`on_end` gets the response object when it is final, unless its client left."""
        self._reader = EventReader(job)
        self._frames: list[bytes] | None = None  # where events go now; None: nobody listens
        self._sequence_number = 0
        self._is_created = False
        self._has_begun = False
        self._usage = UsageCounter()
        self._finish_reason: str | None = None
        self._on_end = on_end
        chat = job.fields
        self._output = OutputBuilder(
            self._tell, num_top_logprobs=chat.top_logprobs or 0, as_ids=chat.return_tokens_as_token_ids
        )
        self.response = _object(fields, job, info, is_stored=is_stored)

    def queue(self, frames: list[bytes] | None) -> None:
        """The events of a response that waits for its turn in the background."""
        self._frames = frames
        self._is_created = True
        self.response["status"] = "queued"
        self._tell_response("response.created")
        self._tell_response("response.queued")

    def begin(self, frames: list[bytes] | None) -> None:
        """The events before any output."""
        self._frames = frames
        self._has_begun = True
        if not self._is_created:
            self._tell_response("response.created")
        self.response["status"] = "in_progress"
        self._tell_response("response.in_progress")

    def write(self, frames: list[bytes] | None, index: int, output: TextOutput) -> None:
        """As `ChunkWriter.write`."""
        if not self._has_begun:
            self.begin(frames)
        self._frames = frames
        self.add(self._reader.read(output))

    def add(self, event: ChoiceEvent) -> None:
        self._usage.add(0, event)
        self._output.add(event)
        self._finish_reason = event.finish_reason or self._finish_reason

    def end(self, frames: list[bytes] | None) -> None:
        """As `ChunkWriter.end`: the terminal event of an answer that the model has ended."""
        self._frames = frames
        is_cut = self._finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        if is_cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self._close(status, item_status=status)
        self._tell_response(f"response.{status}")

    def failure(self, error: ApiError) -> bytes:
        """The `error` event, then the terminal one. The output so far stays."""
        frames: list[bytes] = []
        self.fail(frames, error)
        return b"".join(frames)

    def fail(self, frames: list[bytes] | None, error: ApiError) -> None:
        if not self._has_begun:
            self.begin(frames)
        self._frames = frames
        message, param = error.error["message"], error.error["param"]
        self.response["error"] = {"code": _CODES.get(error.status, "server_error"), "message": message}
        self._close("failed", item_status="incomplete")
        self._tell("error", {"code": error.error["code"], "message": message, "param": param})
        self._tell_response("response.failed")

    def cancel(self, frames: list[bytes] | None) -> None:
        self._frames = frames
        self._close("cancelled", item_status="incomplete")
        self._tell_response("response.incomplete")  # there is no event of its own for it

    def _close(self, status: str, *, item_status: str) -> None:
        is_whole = status in ("completed", "incomplete")
        self.response["output"] = self._output.finish(item_status, is_whole=is_whole)
        self.response["status"] = status
        if status == "completed":
            self.response["completed_at"] = int(time.time())
        self.response["usage"] = _usage(self._usage.as_dict())
        self._on_end(self.response)

    def _tell_response(self, event: str) -> None:
        self._tell(event, {"response": self.response})

    def _tell(self, event: str, fields: dict[str, Any]) -> None:
        number, self._sequence_number = self._sequence_number, self._sequence_number + 1
        if self._frames is not None:
            self._frames.append(named_frame(event, {"type": event, "sequence_number": number, **fields}))


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        # what is written to the prefix cache costs nothing and is not counted
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }


def _object(fields: ResponsesRequest, job: ChatJob, info: ModelInfo, *, is_stored: bool) -> dict[str, Any]:
    """The response before anything was written. Optional fields that this server has no use for are echoed."""
    sampling, chat = job.request.sampling, job.fields
    response: dict[str, Any] = {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": fields.background,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "max_tool_calls": fields.max_tool_calls,
        "metadata": fields.metadata,
        "model": job.model,
        "output": [],
        "parallel_tool_calls": chat.parallel_tool_calls is not False,
        "previous_response_id": fields.previous_response_id,
        # no summaries are written: the thinking itself is in the output
        "reasoning": {"effort": fields.effort, "summary": None},
        "service_tier": "default",
        "store": is_stored,
        "temperature": sampling.temperature,
        "text": {"format": _format(fields), "verbosity": fields.text.verbosity or "medium"},
        "tool_choice": "auto" if fields.tool_choice is None else fields.tool_choice,
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": tool.strict,
            }
            for tool in fields.tools
        ],
        "top_logprobs": fields.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": fields.truncation,
        "usage": None,
    }
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        if (value := getattr(fields, name)) is not None:
            response[name] = value
    return response


def _format(fields: ResponsesRequest) -> dict[str, Any]:
    shape = fields.text.format
    if shape is None:
        return {"type": "text"}
    return shape.model_dump(exclude_none=True, by_alias=True)
