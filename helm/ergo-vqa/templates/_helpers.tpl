{{- define "ergo.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{/* 45 characters, so that with `-engine` there are 52: the label that a StatefulSet gives its pods has 11 more, and a label 63. */}}
{{- define "ergo.fullname" -}}
{{- $name := include "ergo.name" . -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 45 | trimSuffix "-" }}
{{- else if contains $name .Release.Name -}}
{{ .Release.Name | trunc 45 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name $name | trunc 45 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- define "ergo.gateway" -}}{{ include "ergo.fullname" . }}-gateway{{- end }}
{{- define "ergo.engine" -}}{{ include "ergo.fullname" . }}-engine{{- end }}

{{/* Labels that choose pods. Takes (list CONTEXT COMPONENT). */}}
{{- define "ergo.selector" -}}
app.kubernetes.io/name: {{ include "ergo.name" (index . 0) }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* All labels. Takes (list CONTEXT COMPONENT). */}}
{{- define "ergo.labels" -}}
{{- $root := index . 0 -}}
{{ include "ergo.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: ergo-vqa
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Reference of an image. Takes (list CONTEXT IMAGE). */}}
{{- define "ergo.image" -}}
{{- $root := index . 0 -}}{{- $image := index . 1 -}}
{{- with $root.Values.global.imageRegistry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- $image.repository -}}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ default $root.Chart.AppVersion $image.tag }}{{ end -}}
{{- end }}

{{/* What every container is denied. */}}
{{- define "ergo.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* What every pod is denied. Takes the user's number. */}}
{{- define "ergo.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int . }}
runAsGroup: {{ int . }}
fsGroup: {{ int . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* The headless Service that gives each engine's pod its name. */}}
{{- define "ergo.enginePods" -}}{{ include "ergo.engine" . }}-pods{{- end }}

{{/* What gateways ask, with commas between: external engines, a router, each pod by its name, or the Service before pods that come
     and go. */}}
{{- define "ergo.engineUrl" -}}
{{- $urls := list -}}
{{- if not .Values.engine.enabled -}}
{{- range .Values.engine.external.urls }}{{ $urls = append $urls (trimSuffix "/" .) }}{{ end -}}
{{- else if .Values.engine.routerUrl -}}
{{- $urls = list (trimSuffix "/" .Values.engine.routerUrl) -}}
{{- else if eq .Values.engine.autoscaling.kind "none" -}}
{{- range $number := until (max 1 (int .Values.engine.replicas) | int) -}}
{{- $urls = append $urls (printf "http://%s-%d.%s:8001" (include "ergo.engine" $) $number (include "ergo.enginePods" $)) -}}
{{- end -}}
{{- else -}}
{{- $urls = list (printf "http://%s:8001" (include "ergo.engine" .)) -}}
{{- end -}}
{{ join "," $urls }}
{{- end }}

{{/* Whether gateways ask the pods of this chart themselves. */}}
{{- define "ergo.asksPods" -}}
{{- if and .Values.engine.enabled (not .Values.engine.routerUrl) }}true{{ end -}}
{{- end }}

{{/* Ports of the URLs, or the schemes' own, as JSON. */}}
{{- define "ergo.enginePorts" -}}
{{- $ports := list -}}
{{- range splitList "," (include "ergo.engineUrl" .) -}}
{{- $url := urlParse . -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (ternary "443" "80" (eq $url.scheme "https")) -}}
{{- $ports = append $ports (dict "protocol" "TCP" "port" (int $port)) -}}
{{- end -}}
{{ $ports | uniq | toJson }}
{{- end }}

{{/* Whether the engines' cache is one claim, or each pod's own. */}}
{{- define "ergo.sharedCache" -}}
{{- if or .Values.engine.cache.existingClaim (has "ReadWriteMany" .Values.engine.cache.accessModes) }}true{{ end -}}
{{- end }}

{{/* What a claim of the engines' cache asks for. */}}
{{- define "ergo.claim" -}}
accessModes: {{ .Values.engine.cache.accessModes | toJson }}
{{- with .Values.engine.cache.storageClass }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests: {storage: {{ .Values.engine.cache.size }}}
{{- end }}

{{- define "ergo.sessionSecret" -}}
{{ default (printf "%s-session" (include "ergo.fullname" .)) .Values.gateway.sessionSecret.existingSecret }}
{{- end }}

{{- define "ergo.prompts" -}}
{{ default (printf "%s-prompts" (include "ergo.fullname" .)) .Values.gateway.prompts.existingConfigMap }}
{{- end }}

{{/* The whole internet, and nothing else. */}}
{{- define "ergo.internet" -}}
- ipBlock:
    cidr: 0.0.0.0/0
    except: {{ .Values.networkPolicy.privateRanges | toJson }}
- ipBlock: {cidr: "2000::/3"} # what is given out of IPv6
{{- end }}

{{- define "ergo.dns" -}}
- to:
    {{- toYaml .Values.networkPolicy.dnsTo | nindent 4 }}
  ports:
    {{- range .Values.networkPolicy.dnsPorts }}
    - {protocol: UDP, port: {{ int . }}}
    - {protocol: TCP, port: {{ int . }}}
    {{- end }}
{{- end }}

{{/* Trigger of KEDA. Takes (list CONTEXT NAME QUERY THRESHOLD). */}}
{{- define "ergo.trigger" -}}
- type: prometheus
  name: {{ index . 1 }}
  metricType: AverageValue
  metadata:
    serverAddress: {{ required "autoscaling by keda asks Prometheus: set keda.prometheus" (index . 0).Values.keda.prometheus | quote }}
    query: {{ index . 2 | quote }}
    threshold: {{ index . 3 | toString | quote }}
{{- end }}

{{/* Questions in the gateways of this release. */}}
{{- define "ergo.questions" -}}
{{- $of := printf "{namespace=%q,service=%q}" .Release.Namespace (include "ergo.gateway" .) -}}
sum(ergo_requests_queued{{ $of }}) + sum(ergo_requests_in_flight{{ $of }})
{{- end }}

{{/* Requests that wait in the engines of this release. */}}
{{- define "ergo.waiting" -}}
sum(vllm:num_requests_waiting{{ printf "{namespace=%q,service=%q}" .Release.Namespace (include "ergo.engine" .) }})
{{- end }}

{{/* What values.schema.json cannot say, as it is about two values at a time. */}}
{{- define "ergo.validate" -}}
{{- $gateway := .Values.gateway.termination -}}
{{- $needs := add $gateway.preStopSeconds $gateway.drainSeconds 3 -}}
{{- if not (lt (int $needs) (int $gateway.gracePeriodSeconds)) -}}
{{- fail (printf "gateway.termination: preStopSeconds + drainSeconds + 3 = %d must be less than gracePeriodSeconds = %d" (int $needs) (int $gateway.gracePeriodSeconds)) -}}
{{- end -}}
{{- $engine := .Values.engine.termination -}}
{{- $needs := add $engine.preStopSeconds $engine.shutdownSeconds -}}
{{- if not (lt (int $needs) (int $engine.gracePeriodSeconds)) -}}
{{- fail (printf "engine.termination: preStopSeconds + shutdownSeconds = %d must be less than gracePeriodSeconds = %d" (int $needs) (int $engine.gracePeriodSeconds)) -}}
{{- end -}}
{{- if and .Values.engine.enabled .Values.engine.external.urls -}}
{{- fail "engine: either enabled, or external.urls, not both; a router before this chart's engines is engine.routerUrl" -}}
{{- end -}}
{{- if and (not .Values.engine.enabled) .Values.engine.routerUrl -}}
{{- fail "engine: routerUrl is for engines that the chart runs; with enabled: false name the router in external.urls" -}}
{{- end -}}
{{- $images := default 8 .Values.gateway.settings.max_images -}}
{{- if and .Values.engine.enabled (not (lt (int $images) (int .Values.engine.maxImages))) -}}
{{- fail (printf "engine.maxImages = %d must be more than gateway.settings.max_images = %d: the crop is one more" (int .Values.engine.maxImages) (int $images)) -}}
{{- end -}}
{{- if and .Values.gateway.prompts.content .Values.gateway.prompts.existingConfigMap -}}
{{- fail "gateway.prompts: either content, or existingConfigMap, not both" -}}
{{- end -}}
{{- if not (or .Values.engine.enabled .Values.engine.external.urls) -}}
{{- fail "engine: enabled is false, and external.urls names none" -}}
{{- end -}}
{{- range $name, $scaled := dict "gateway" .Values.gateway.autoscaling "engine" .Values.engine.autoscaling -}}
{{- if gt (int $scaled.minReplicas) (int $scaled.maxReplicas) -}}
{{- fail (printf "%s.autoscaling: minReplicas is more than maxReplicas" $name) -}}
{{- end -}}
{{- end -}}
{{- $monitor := .Values.monitoring.serviceMonitor -}}
{{- if and $monitor.enabled .Values.gateway.apiKeys.existingSecret (not $monitor.authorization.existingSecret) (not .Values.gateway.settings.open_metrics) -}}
{{- fail "monitoring.serviceMonitor: with API keys it needs authorization.existingSecret, or gateway.settings.open_metrics: true" -}}
{{- end -}}
{{- if and .Values.tests.enabled .Values.gateway.apiKeys.existingSecret (not .Values.tests.apiKey.existingSecret) -}}
{{- fail "tests: with API keys it needs apiKey.existingSecret, or enabled: false" -}}
{{- end -}}
{{- end }}
