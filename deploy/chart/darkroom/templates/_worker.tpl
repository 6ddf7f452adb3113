{{/* What worker sets and the jobs that announce their models share: a dict of root, name, set (with its defaults) */}}

{{- define "darkroom.workerImage" -}}
{{- $images := .root.Values.image -}}
{{- include "darkroom.image" (dict "root" .root "name" (ternary $images.worker $images.workerCpu (gt (int .set.gpus) 0))) -}}
{{- end -}}

{{- define "darkroom.modelsEnv" -}}
- name: DARKROOM_MODELS
  value: {{ include "darkroom.models" .set.models | quote }}
{{- end -}}

{{- define "darkroom.weightsMount" -}}
{{- if include "darkroom.needsWeights" .set }}
- name: weights
  mountPath: /models
  readOnly: true
{{- end }}
{{- with .set.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "darkroom.weightsVolume" -}}
{{- $weights := .root.Values.weights -}}
{{- if include "darkroom.needsWeights" .set }}
{{- if and (not $weights.existingClaim) (not $weights.size) }}
{{- fail (printf "workers.%s has models under /models: name the claim that holds them as weights.existingClaim, or say weights.size and, in `fetch`, what to fill a new one with" .name) }}
{{- end }}
- name: weights
  persistentVolumeClaim:
    claimName: {{ $weights.existingClaim | default (printf "%s-weights" (include "darkroom.fullname" .root)) }}
{{- end }}
{{- if and .set.fetch $weights.tokenSecret }}
- name: hub-token
  secret:
    secretName: {{ $weights.tokenSecret }}
    defaultMode: 0440
    items:
      - {key: token, path: token}
{{- end }}
{{- with .set.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* One after the other; each ends at once where the files are there. Several pods at a time take turns. */}}
{{- define "darkroom.fetching" -}}
{{- $token := .root.Values.weights.tokenSecret -}}
{{- range $n, $what := .set.fetch }}
{{- $parts := splitList "@" $what }}
- name: fetch-{{ $n }}
  image: {{ include "darkroom.workerImage" $ }}
  imagePullPolicy: {{ $.root.Values.image.pullPolicy }}
  args:
    - fetch
    - {{ first $parts }}
    - --to
    - /models/{{ base (first $parts) }}
    {{- if gt (len $parts) 1 }}
    - --revision
    - {{ last $parts | quote }}
    {{- end }}
  env:
    - {name: HF_HUB_OFFLINE, value: "0"}
    {{- if $token }}
    - {name: DARKROOM_HF_TOKEN_FILE, value: /run/secrets/hub/token}
    {{- end }}
    {{- with $.set.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  resources:
    requests: {cpu: 500m, memory: 256Mi}
    limits: {memory: 1Gi}
  securityContext:
    {{- include "darkroom.containerSecurity" $ | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: weights, mountPath: /models}
    {{- if $token }}
    - {name: hub-token, mountPath: /run/secrets/hub, readOnly: true}
    {{- end }}
    {{- with $.set.extraVolumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
{{- end -}}
