"""CORS as Starlette's, but for what a refused preflight is answered: an error as any other."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from service.api.envelope import render
from service.errors import Forbidden


class CrossOrigin(CORSMiddleware):
    """Lets pages of the configured origins call the service."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Whether a page may ask what it wants to, in the envelope where it may not."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        refused = render(
            Forbidden(
                f"this is not open to pages of {request_headers['origin'][:100]!r} with the method "
                f"{request_headers['access-control-request-method'][:100]!r}: allowed are the origins in the setting "
                f"'cors' and {', '.join(self.allow_methods)}",
                code="cross_site",
            )
        )
        for name, value in response.headers.items():
            if name == "vary" or name.startswith("access-control-"):
                refused.headers[name] = value
        return refused
