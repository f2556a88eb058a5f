// The interface as its OpenAPI document describes it, to be read and tried; nothing is loaded from elsewhere.
SwaggerUIBundle({ url: "/openapi.json", dom_id: "#operations", deepLinking: true, validatorUrl: null });
