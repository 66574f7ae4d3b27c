{{- define "ergo.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "ergo.fullname" -}}
{{- $name := include "ergo.name" . -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains $name .Release.Name -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
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

{{- define "ergo.engineUrl" -}}
{{- if .Values.engine.enabled -}}
http://{{ include "ergo.engine" . }}:8001
{{- else -}}
{{ first .Values.engine.external.urls | trimSuffix "/" }}
{{- end -}}
{{- end }}

{{/* Port of an external engine's URL, or the scheme's own. */}}
{{- define "ergo.enginePort" -}}
{{- $url := urlParse (include "ergo.engineUrl" .) -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" -}}
{{- default (ternary "443" "80" (eq $url.scheme "https")) $port -}}
{{- end }}

{{- define "ergo.sessionSecret" -}}
{{ default (printf "%s-session" (include "ergo.fullname" .)) .Values.gateway.sessionSecret.existingSecret }}
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
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
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
{{- fail "engine: either enabled, or external.urls, not both" -}}
{{- end -}}
{{- if not (or .Values.engine.enabled .Values.engine.external.urls) -}}
{{- fail "engine: enabled is false, and external.urls names none" -}}
{{- end -}}
{{- range $name, $scaled := dict "gateway" .Values.gateway.autoscaling "engine" .Values.engine.autoscaling -}}
{{- if gt (int $scaled.minReplicas) (int $scaled.maxReplicas) -}}
{{- fail (printf "%s.autoscaling: minReplicas is more than maxReplicas" $name) -}}
{{- end -}}
{{- end -}}
{{- $cache := .Values.engine.cache -}}
{{- $engines := ternary .Values.engine.autoscaling.maxReplicas .Values.engine.replicas (eq .Values.engine.autoscaling.kind "keda") -}}
{{- if and .Values.engine.enabled (gt (int $engines) 1) (not $cache.existingClaim) (not (has "ReadWriteMany" $cache.accessModes)) -}}
{{- fail "engine: several pods need a cache that several nodes can mount: cache.accessModes: [ReadWriteMany], or cache.existingClaim" -}}
{{- end -}}
{{- $monitor := .Values.monitoring.serviceMonitor -}}
{{- if and $monitor.enabled .Values.gateway.apiKeys.existingSecret (not $monitor.authorization.existingSecret) (not .Values.gateway.settings.open_metrics) -}}
{{- fail "monitoring.serviceMonitor: with API keys it needs authorization.existingSecret, or gateway.settings.open_metrics: true" -}}
{{- end -}}
{{- if and .Values.tests.enabled .Values.gateway.apiKeys.existingSecret (not .Values.tests.apiKey.existingSecret) -}}
{{- fail "tests: with API keys it needs apiKey.existingSecret, or enabled: false" -}}
{{- end -}}
{{- end }}
